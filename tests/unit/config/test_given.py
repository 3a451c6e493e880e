"""A field that is given for a choice that was not made is refused, whatever its value."""

from pathlib import Path

import pytest

from ds_dpo.config.fields import FIELDS
from ds_dpo.config.given import NEEDS
from ds_dpo.config.load import config_to_yaml, load_config
from ds_dpo.errors import ConfigError


def file_with(folder: Path, text: str) -> list[str]:
    (folder / "run.yaml").write_text(f"base: miniature\n{text}\n", encoding="utf-8")
    return ["--config", str(folder / "run.yaml")]


REFUSED = [
    (
        "adapter.rank",
        "16",
        "adapter.rank 16 has no effect with adapter.type none; take lora or rslora or dora, or leave",
    ),
    ("adapter.rank", "8", "adapter.rank 8 has no effect with adapter.type none"),
    ("adapter.targets", "[to_q, to_k, to_v, to_out.0]", "adapter.targets to_q to_k to_v to_out.0 has no effect"),
    ("optimizer.lion_beta1", "0.9", "no effect with optimizer.type adamw; take lion or lion_8bit, or leave"),
    ("schedule.num_cycles", "1", "no effect with schedule.name linear; take cosine_with_restarts, or leave"),
    ("schedule.power", "1.0", "no effect with schedule.name linear; take polynomial"),
    (
        "data.bucket_step",
        "64",
        "data.bucket_step 64 has no effect without data.aspect_buckets; give data.aspect_buckets",
    ),
    ("data.max_aspect", "3", "data.max_aspect 3 has no effect without data.aspect_buckets; give"),
    ("objective.gap_decay", "0.9", "no effect without objective.target_gradient_factor; give"),
]


@pytest.mark.parametrize(("path", "word", "message"), REFUSED)
def test_a_field_without_its_choice_is_refused_in_a_file_and_as_an_option(
    tmp_path: Path, path: str, word: str, message: str
) -> None:
    values = word.strip("[]").split(", ")
    for argv in (file_with(tmp_path, f"{path}: {word}"), ["--config", "miniature", f"--{path}", *values]):
        with pytest.raises(ConfigError) as refused:
            load_config(argv)
        assert message in str(refused.value)


def test_the_short_name_and_the_stated_choice_change_nothing(tmp_path: Path) -> None:
    for argv in (
        ["--config", "miniature", "--rank", "16"],
        ["--config", "miniature", "--lora_rank", "16", "--adapter.type", "none"],
        file_with(tmp_path, "adapter: {type: none, rank: 16}"),
    ):
        with pytest.raises(ConfigError, match=r"adapter\.rank 16 has no effect with adapter\.type none"):
            load_config(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapter.type", "lora", "--rank", "16"],
        ["--schedule.name", "constant", "--warmup_steps", "0"],
        ["--schedule.decay_steps", "none", "--diffusion.logit_mean", "none"],
        ["--optimizer.type", "lion", "--optimizer.lion_beta1", "0.9"],
        ["--data.aspect_buckets", "--data.bucket_step", "16"],
        ["--held_out.every_steps", "5", "--held_out.split", "validation_unique", "--held_out.num_pairs", "8"],
    ],
)
def test_what_has_an_effect_or_switches_off_is_taken(argv: list[str]) -> None:
    load_config(["--config", "miniature", *argv])


def test_an_option_may_switch_off_what_a_file_sets_up(tmp_path: Path) -> None:
    held_out = file_with(tmp_path, "held_out: {every_steps: 5, split: validation_unique}")
    assert load_config([*held_out, "--held_out.every_steps", "none"]).config.held_out.every_steps is None
    adapter = file_with(tmp_path, "adapter: {type: lora, rank: 16}")
    assert load_config([*adapter, "--adapter.type", "none"]).config.adapter.type == "none"
    buckets = file_with(tmp_path, "data: {aspect_buckets: true, bucket_step: 16}")
    assert load_config([*buckets, "--data.aspect_buckets", "false"]).config.data.aspect_buckets is False


def test_a_value_that_takes_back_a_files_is_taken(tmp_path: Path) -> None:
    """The message on a schedule that ignores num_cycles 3 says: set num_cycles to 1."""
    restarts = file_with(tmp_path, "schedule: {name: cosine_with_restarts, num_cycles: 3}")
    config = load_config([*restarts, "--schedule.name", "cosine", "--schedule.num_cycles", "1"]).config
    assert (config.schedule.name, config.schedule.num_cycles) == ("cosine", 1)


def test_the_record_of_a_run_is_a_configuration(tmp_path: Path) -> None:
    config = load_config(["--config", "miniature"]).config
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(["--config", str(tmp_path / "config.yaml")]).config == config


def test_the_table_names_fields_and_their_choices() -> None:
    for path, need in NEEDS.items():
        assert {path, need.field} <= set(FIELDS)
        assert set(need.choices or ()) <= set(FIELDS[need.field].choices)
