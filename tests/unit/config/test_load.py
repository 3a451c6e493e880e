"""The run configuration: presets, files, bounds, identity and the way through YAML."""

import subprocess
import sys
from pathlib import Path

import pytest
from repository import PACKAGE

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.fields import FIELDS
from ds_dpo.config.identity import compare_identity, identity
from ds_dpo.config.load import config_from_yaml, config_to_yaml, load_config, preset_names
from ds_dpo.config.names import ALIASES, EXPLAINED, FLAT_NAMES
from ds_dpo.config.objectives import DpoConfig
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError

SECTIONS_THAT_ONLY_LOOK = ("cadence", "validation", "held_out", "watchdog", "supervision")
CACHED = ["--reference.residency", "cached", "--reference.cache", "errors"]


def load(*argv: str) -> RunConfig:
    return load_config(list(argv)).config


def file_with(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_default_is_the_authors_sdxl_recipe() -> None:
    config = load()
    assert (config.model.pretrained, config.model.vae) == (
        "stabilityai/stable-diffusion-xl-base-1.0",
        "madebyollin/sdxl-vae-fp16-fix",
    )
    assert (config.data.dataset, config.data.expected_pairs) == ("yuvalkirstain/pickapic_v2", 851293)
    assert (config.data.resolution, config.data.prompt_dropout) == (1024, 0.2)
    assert config.objective == DpoConfig(beta=5000, label_smoothing=0)
    assert config.batch.pairs_per_step == 2048
    assert (config.optimizer.type, config.optimizer.learning_rate) == ("adamw", 1e-5)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("constant_with_warmup", 200)
    assert (config.deepspeed_config, config.batch.micro_batch_pairs) == ("zero1_bf16", 4)


def test_every_preset_is_complete_and_survives_yaml(tmp_path: Path) -> None:
    for name in preset_names():
        config = load("--config", name)
        assert config_from_yaml(file_with(tmp_path, config_to_yaml(config))) == config, name


def test_a_file_stands_on_its_base_and_the_command_line_on_the_file(tmp_path: Path) -> None:
    path = file_with(
        tmp_path,
        "base: miniature\nlearning_rate: 3e-4\n"
        "schedule: {warmup_steps: 5}\ndata: {flip: off, size_conditioning: true}\n",
    )
    config = load("--config", path, "--warmup_steps", "7")
    assert config.optimizer.learning_rate == 3e-4
    assert (config.data.flip, config.data.size_conditioning) == ("off", "true")
    assert config.schedule.warmup_steps == 7
    assert config.objective == DpoConfig(beta=500)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = file_with(tmp_path, "base: miniature\noptimizer: {epsilon: 1e-8, weight_decay: 1E-2}\n")
    config = load("--config", path)
    assert (config.optimizer.epsilon, config.optimizer.weight_decay) == (1e-8, 0.01)


def test_another_objective_inherits_nothing_of_the_presets() -> None:
    config = load("--config", "miniature", "--objective.type", "sft")
    assert config.objective.model_dump() == {"type": "sft"}
    with pytest.raises(ConfigError, match=r"objective\.beta = 3: objective\.type sft has no such field"):
        load("--config", "miniature", "--objective.type", "sft", "--beta", "3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: miniature\noptimizer: {lerning_rate: 1}\n", "did you mean optimizer.learning_rate"),
        ("base: miniature\ntrane_steps: 1\nmax_train_stps: 3\n", "trane_steps is not known"),
        ("base: miniature\nobjectve: {type: dpo}\n", "objectve is not known; did you mean objective?"),
        ("base: miniature\noptimizer: {lr: 1}\n", "optimizer.lr is not known; did you mean optimizer.learning_rate?"),
        ("base: miniatur\n", "nor a file; did you mean miniature or miniature_flow?"),
        ("base: miniature\nseed: 1\nseed: 2\n", "seed is given twice"),
        ("base: miniature\nlearning_rate: 1\noptimizer: {learning_rate: 2}\n", "optimizer.learning_rate is set twice"),
        ("base: miniature\nseed: true\n", "seed = true: the option is not a switch"),
        ("base: miniature\nbatch: 16\n", "batch is a section"),
        ("base: run.yaml\n", "leads back to itself"),
        ("base: nowhere\n", "nowhere"),
        ("[1, 2]\n", "must contain names and values"),
        ("a: {b\n", "is not valid YAML"),
        ("base: miniature\nobject: !!python/object:os.system {}\n", "is not valid YAML"),
        ("max_train_steps: 3\n", "model.pretrained must be given"),
    ],
)
def test_a_file_that_does_not_fit_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("--config", file_with(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate", "0"], "optimizer.learning_rate = 0: Input should be greater than 0"),
        (["--resolution", "1020"], "data.resolution = 1020"),
        (["--data.flip", "maybe"], "'off', 'shared' or 'independent'"),
        (
            ["--objective.type", "rlhf"],
            "objective.type = rlhf: one of dpo, ipo, hinge, dmpo, poly, alpha, linear, sdpo",
        ),
        (["--schedule.name", "constant"], "constant ignores warmup_steps 200; take constant_with_warmup"),
        (["--schedule.decay_steps", "9"], "constant_with_warmup ignores decay_steps 9"),
        (["--validation.prompts"], "give validation.prompts, or set sample_every_steps to none"),
        (["--model.family", "sd15", "--data.size_conditioning", "true"], "no effect on model.family sd15"),
        (["--objective.label_smoothing", "nan"], "objective.label_smoothing = nan"),
        (["--objective.type", "sft", "--data.ties", "soft"], "data.ties soft gives target probabilities, which"),
        (
            ["--objective.type", "sft", "--data.confidence", "target"],
            "sft ignores; dpo, ipo, hinge",
        ),
        (
            ["--beta", "100", "--objective.type", "dspo"],
            "objective.beta 100 is also dspo's shift, and with a shift of 1 or more",
        ),
        (["--objective.type", "mapo", "--beta", "5"], "objective.beta = 5: objective.type mapo has no such field"),
        (
            ["--objective.beta_min", "100"],
            "objective.beta_min 100 has no effect on a fixed beta; also set objective.target_gradient",
        ),
        (["--objective.target_gradient_factor", "0.7"], "objective.target_gradient_factor = 0.7: Input should be less"),
        (["--objective.type", "orpo", "--terms.anchor_weight", "0.1"], "to the reference, but objective.type orpo has"),
        (
            ["--objective.type", "sft", "--terms.sft_weight", "0.1"],
            "which is already the whole loss of objective.type sft",
        ),
        (
            ["--objective.type", "kto", "--beta", "9", "--lambda_d_kto", "0", "--lambda_u_kto", "0"],
            "leave nothing to train on; give one of them a weight above 0",
        ),
        (["--terms.sft_weight", "-1"], "terms.sft_weight = -1"),
        (
            [*CACHED, "--objective.type", "dspo", "--beta", "0.1"],
            "type dspo needs the reference's predictions",
        ),
        ([*CACHED, "--terms.anchor_weight", "0.1"], "but terms.anchor_weight 0.1 needs the reference's predictions"),
        ([*CACHED, "--objective.type", "mapo"], "no effect: objective.type mapo has no reference"),
        (
            ["--diffusion.logit_mean", "0"],
            "uniform ignores logit_mean 0.0; set it to logit_normal, or logit_mean to none",
        ),
        (["--diffusion.timestep_sampling", "turbo", "--diffusion.logit_std", "1"], "turbo ignores logit_std 1.0"),
        (["--diffusion.timestep_sampling", "logit_normal", "--diffusion.logit_mean", "0"], "needs logit_mean and log"),
        (
            ["--diffusion.min_timestep", "5", "--diffusion.max_timestep", "4"],
            "max_timestep 4 is below diffusion.min_timestep 5",
        ),
        (["--snr_gamma", "5"], "error_weighting none ignores snr_gamma 5.0; set it to min_snr"),
        (["--diffusion.error_weighting", "snr", "--snr_gamma", "5"], "error_weighting snr ignores snr_gamma 5.0"),
        (["--diffusion.error_weighting", "min_snr"], "min_snr needs snr_gamma; the paper uses 5"),
        (["--noise_offset", "-0.1"], "diffusion.noise_offset = -0.1"),
        (["--watchdog.rate_factor", "0.5"], "action none ignores watchdog.rate_factor 0.5; set action to lower_rate"),
        (
            ["--objective.type", "sft", "--watchdog.action", "stop", "--held_out.every_steps", "none"],
            "watchdog.action stop has nothing to read: objective",
        ),
        (["--watchdog.max_fall", "0.1"], "watchdog.max_fall 0.1 has no metric to read; set cadence.keep_best"),
        (
            ["--cadence.keep_best", "held_out.accuracy", "--watchdog.max_fall", "0.1", "--watchdog.action", "off"],
            "watchdog.action off ignores watchdog.max_fall 0.1",
        ),
        (
            ["--cadence.keep_best", "accuracy"],
            "cadence.keep_best accuracy is no metric of an evaluation; held_out.accuracy, ",
        ),
        (["--cadence.keep_best", "held_out.loss"], "cadence.keep_best held_out.loss is no metric"),
        (["--cadence.keep_best", "validation."], "held_out.policy_chosen_error or validation.SCORER would fit"),
        (
            ["--cadence.keep_best", "held_out.margin", "--held_out.every_steps", "none"],
            "cadence.keep_best held_out.margin is never evaluated: set held_out.every_steps",
        ),
        (
            ["--cadence.keep_best", "validation.clip", "--cadence.sample_every_steps", "none"],
            "cadence.keep_best validation.clip is never evaluated: set cadence.sample_every_steps",
        ),
        (
            ["--watchdog.window_steps", "5", "--held_out.every_steps", "5", "--held_out.split", "test_unique"],
            "watchdog.window_steps 5 is ignored while held_out is on",
        ),
        (
            ["--held_out.split", "train"],
            "would evaluate pairs that are trained on: split train of yuvalkirstain/pickapic",
        ),
        (
            ["--held_out.every_steps", "5", "--held_out.split", "train"],
            "give held_out.split, such as validation_unique",
        ),
        (["--held_out.share", "0.1"], "held_out.split validation_unique has no effect; give one of the two"),
        (["--held_out.split", "none", "--held_out.share", "1"], "held_out.share = 1: Input should be less than 1"),
        (["--data.cache", "here", "--data.crop", "random"], "data.crop random does not work with data.cache"),
        (
            ["--objective.type", "sft", "--reference.residency", "cpu"],
            "residency cpu has no effect: objective.type sft",
        ),
        (
            ["--objective.type", "sft", "--reference.refresh_every_steps", "5"],
            "refresh_every_steps 5 has no effect: objective",
        ),
        (["--reference.residency", "zero3", "--reference.refresh_every_steps", "5"], "needs reference.residency repl"),
        (["--objective.type", "sft", "--reference.preflight", "exact"], "preflight exact has no effect with objective"),
        (["--objective.type", "sft", "--reference.preflight", "near"], "preflight near has no effect: objective.type"),
        (["--reference.preflight", "close"], "reference.preflight = close: Input should be 'exact' or 'near'"),
        (["--reference.residency", "adapter"], "adapter.type none lacks; set adapter.type to lora"),
        (
            ["--reference.ema_decay", "0.9", "--reference.refresh_every_steps", "5"],
            "two ways in which the reference",
        ),
        (
            ["--adapter.type", "lora", "--reference.residency", "adapter", "--reference.ema_decay", "0.99"],
            "ema_decay 0.99 needs a reference with weights of its own, which reference.residency adapter lacks",
        ),
        (["--adapter.type", "lora", "--reference.ema_decay", "0.99"], "ema_decay 0.99 with adapter.type lora: the ref"),
        (["--reference.ema_decay", "1"], "reference.ema_decay = 1: Input should be less than 1"),
        (["--adapter.type", "lora", "--reference.refresh_every_steps", "5"], "has no low-rank layers that could hold"),
    ],
)
def test_values_out_of_bounds_name_field_value_and_what_fits(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert message in str(caught.value)


def test_free_fields_are_exactly_those_that_leave_the_result_alone() -> None:
    assert {
        path for path, spec in FIELDS.items() if not spec.is_identity and spec.section not in SECTIONS_THAT_ONLY_LOOK
    } == {
        "output_dir",
        "max_train_steps",
        "deterministic",
        "allow_tf32",
        "deepspeed_config",
        "expected_world_size",
        "trackers",
        "model.attention",
        "model.gradient_checkpointing",
        "data.cache_dir",
        "data.expected_pairs",
        "data.max_bad_rows",
        "data.workers",
        "reference.residency",
        "reference.cache",
        "reference.preflight",
        "data.image_root",
        "data.cache",
        "data.prefetch",
        "batch.micro_batch_pairs",
        "non_finite.max_steps_in_a_row",
    }
    looking = [spec for spec in FIELDS.values() if spec.section in SECTIONS_THAT_ONLY_LOOK]
    # the pairs of the share are not trained on
    assert {spec.path for spec in looking if spec.is_identity} == {"held_out.share"}


def test_identity_changes_are_listed_and_free_ones_are_not() -> None:
    old = identity(load("--config", "miniature"), "bf16")
    free = load(
        *("--config", "miniature", "--micro_batch_pairs", "2", "--data.workers", "3", "--output_dir", "elsewhere"),
        *("--max_train_steps", "900", "--schedule.decay_steps", "300"),
    )
    assert compare_identity(old, identity(free, "bf16")) == []
    other = load("--config", "miniature", "--learning_rate", "1e-4", "--pairs_per_step", "8", "--seed", "1")
    changes = [str(change) for change in compare_identity(old, identity(other, "fp32"))]
    assert changes == [
        "seed: 0 -> 1",
        "batch.pairs_per_step: 16 -> 8",
        "optimizer.learning_rate: 0.0002 -> 0.0001",
        "precision: bf16 -> fp32",
    ]


def test_a_decaying_schedule_ties_the_run_to_its_length_and_a_constant_one_does_not() -> None:
    linear = [identity(load("--config", "miniature", "--max_train_steps", steps), "bf16") for steps in ("500", "600")]
    assert [str(change) for change in compare_identity(*linear)] == ["schedule.decay_steps: 500 -> 600"]
    constant = [identity(load("--max_train_steps", steps), "bf16") for steps in ("500", "600")]
    assert compare_identity(*constant) == []


def test_another_objective_is_another_run() -> None:
    dpo, sft = (identity(load("--config", "miniature", "--objective.type", kind), "bf16") for kind in ("dpo", "sft"))
    assert [str(change) for change in compare_identity(dpo, sft)] == [
        "objective.type: dpo -> sft",
        "objective.beta: 500.0 -> (not set)",
        "objective.target_gradient_factor: None -> (not set)",
        "objective.beta_min: None -> (not set)",
        "objective.beta_max: None -> (not set)",
        "objective.gap_decay: 0.9 -> (not set)",
        "objective.label_smoothing: 0.0 -> (not set)",
    ]


def test_every_other_name_leads_to_a_field_or_a_reason() -> None:
    assert set(FLAT_NAMES.values()) | set(ALIASES.values()) <= set(FIELDS)
    assert not set(EXPLAINED) & (set(FIELDS) | set(FLAT_NAMES) | set(ALIASES))
    assert all(spec.description for spec in FIELDS.values())


def test_assets_lie_inside_the_package() -> None:
    assert resolve_asset("ds_dpo://assets/miniature/model") == str(PACKAGE / "assets" / "miniature" / "model")
    assert resolve_asset("stabilityai/sdxl") == "stabilityai/sdxl"
    with pytest.raises(ConfigError, match="leads out of the package"):
        resolve_asset("ds_dpo://../secrets")


def test_configuration_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, ds_dpo.engine.settings; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
