"""The command line: names, spellings, contradictions and help."""

import pytest

from ds_dpo.config.fields import FIELDS
from ds_dpo.config.load import load_config
from ds_dpo.config.names import ALIASES
from ds_dpo.errors import ConfigError


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "3e-6"],
        ["--learning-rate=3e-6"],
        ["--optimizer.learning_rate=0.000003"],
        ["--optimizer.learning-rate", "3e-6"],
        ["--lr", "3e-6"],
        ["--learning_rate", "3e-6", "--optimizer.learning_rate", "0.000003"],
    ],
)
def test_a_field_has_many_spellings(argv: list[str]) -> None:
    assert load_config(argv).config.optimizer.learning_rate == 3e-6


@pytest.mark.parametrize(
    ("argument", "section", "field", "value"),
    [
        ("--beta_dpo=2000", "objective", "beta", 2000),
        ("--lr_warmup_steps=10", "schedule", "warmup_steps", 10),
        ("--proportion-empty-prompts=0.1", "data", "prompt_dropout", 0.1),
        ("--dataset_name=some/set", "data", "dataset", "some/set"),
        ("--checkpointing_steps=7", "cadence", "save_every_steps", 7),
        ("--per_device_train_batch_size=2", "batch", "micro_batch_pairs", 2),
        ("--max_grad_norm=none", "optimizer", "max_grad_norm", None),
        ("--gradient_checkpointing=false", "model", "gradient_checkpointing", "none"),
    ],
)
def test_names_of_other_trainers_are_understood(argument: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(load_config([argument]).config, section), field) == value


def test_switches_and_lists() -> None:
    config = load_config(
        [
            "--config",
            "miniature",
            "--gradient_checkpointing",
            "--validation.prompts",
            "a red cross",
            "b",
            "--validation.seeds=4",
        ]
    ).config
    assert config.model.gradient_checkpointing == "all"
    assert config.validation.prompts == ["a red cross", "b"]
    assert config.validation.seeds == [4]


def test_the_launchers_local_rank_is_taken_and_ignored() -> None:
    plain = load_config(["--seed", "3"])
    assert load_config(["--local_rank=1", "--seed", "3"]) == plain
    assert load_config(["--local-rank", "1", "--seed", "3"]) == plain


def test_a_dry_run_may_reckon_with_other_ranks() -> None:
    loaded = load_config(["--dry-run", "--world-size", "16"])
    assert (loaded.dry_run, loaded.world_size) == (True, 16)
    with pytest.raises(ConfigError, match="use it with --dry_run, or give --expected_world_size"):
        load_config(["--world_size", "16"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--config sdxl_pickapik", "did you mean sdxl_pickapic"),
        (
            "--config sdxl_pickapik",
            "(flux1_dev_lora, flux2_klein_full_zero3, miniature, miniature_flow, sd15_kto, sd15_pickapic, ",
        ),
        ("--config missing/run.yaml", "missing/run.yaml cannot be read: No such file"),
        ("--lerning_rate 1", "option --lerning_rate is not known; did you mean learning_rate?"),
        ("--optimizer.lr 1", "option --optimizer.lr is not known; did you mean optimizer.learning_rate?"),
        ("--optimizer.learning 1", "did you mean optimizer.learning_rate?"),
        ("--optimizer.warmup_steps 1", "did you mean schedule.warmup_steps?"),
        ("--adapter.lora_rank 1", "did you mean adapter.rank?"),
        ("--objectve.beta 1", "did you mean objective.beta?"),
        ("--objectve.mu 1", "did you mean objective.mu?"),
        ("--optimizer.use_8bit_adam", "is not accepted: give --optimizer.type adamw_8bit"),
        ("--cadence.save_steps 1", "did you mean cadence.save_every_steps?"),
        ("--nothing.like_it 1", "option --nothing.like_it is not known; --help lists all"),
        ("--dryrun", "did you mean dry_run?"),
        ("--learning_rate 1 --lr 2", "optimizer.learning_rate is set twice with different values: 1 and 2"),
        ("--seed 1 --seed 2", "seed is set twice with different values: 1 and 2"),
        ("--config miniature --config sdxl_pickapic", "--config is given twice"),
        ("--scale_lr", "the learning rate is never scaled"),
        ("--train_batch_size 4", "give --micro_batch_pairs (one rank, at once) or --pairs_per_step"),
        ("--mixed_precision fp16", "precision is set in the file of --deepspeed_config"),
        ("--alpha 16", "give --objective.type alpha; fields of this name are adapter.alpha, objective.alpha"),
        ("--objective sft", "is a section; its fields are objective.type, objective.beta"),
        ("--seed", "expected one argument"),
        ("miniature", "unrecognized arguments: miniature"),
        ("--dry_run --world_size 0", "at least 1 rank"),
    ],
)
def test_what_is_not_understood_is_an_error_that_helps(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(argv.split())
    assert message in str(caught.value)


def test_help_shows_every_field_and_the_chosen_configurations_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(["--config", "miniature", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{path} " in text for path in FIELDS)
    assert all(f"--{alias}" in text for alias in ALIASES)
    assert text.index("--learning_rate X, --optimizer.learning_rate X") < text.index("--optimizer.weight_decay X")
    assert "by the batch size or the number of ranks. [0.0002] * (also --lr)" in " ".join(text.split())
    assert "prefer the chosen image with probability 1 - alpha. For dmpo. [0.01] *" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 112
