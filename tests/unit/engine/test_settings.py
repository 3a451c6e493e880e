"""DeepSpeed's settings: resolved from both configurations, and refused where DeepSpeed would swallow them."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.config.load import load_config
from ds_dpo.engine.settings import accumulation, reference_settings, resolve_deepspeed
from ds_dpo.engine.settings_file import DS_CONFIGS, KNOWN_KEYS
from ds_dpo.engine.settings_schema import REFUSED
from ds_dpo.errors import ConfigError

EXPECTED = {  # name: stage, precision, optimizer offloaded, weights offloaded
    "zero1_bf16": (1, "bf16", False, False),
    "zero1_fp32_cpu": (1, "fp32", False, False),
    "zero2_bf16": (2, "bf16", False, False),
    "zero2_fp16": (2, "fp16", False, False),
    "zero2_fp32_cpu": (2, "fp32", False, False),
    "zero3_bf16": (3, "bf16", False, False),
    "zero3_fp16": (3, "fp16", False, False),
    "zero3_fp32_cpu": (3, "fp32", False, False),
    "zero3_offload": (3, "bf16", True, True),
}


def changed(folder: Path, base: str, **changes: Any) -> str:
    """Write a file of ds_configs/ with other values; a__b names b inside a. Returns its path."""
    settings = json.loads((DS_CONFIGS / f"{base}.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        *blocks, key = name.split("__")
        holder = settings
        for block in blocks:
            holder = holder.setdefault(block, {})
        holder[key] = value
    path = folder / "changed.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


def test_shipped_files_are_what_their_names_say_and_accumulate_in_fp32() -> None:
    assert {path.stem for path in DS_CONFIGS.glob("*.json")} == set(EXPECTED)
    for name, (stage, precision, offloads_optimizer, offloads_parameters) in EXPECTED.items():
        resolved = resolve_deepspeed(load_config(["--deepspeed_config", name]).config, world_size=16)
        assert (resolved.stage, resolved.precision) == (stage, precision), name
        assert (resolved.offloads_optimizer, resolved.offloads_parameters) == (offloads_optimizer, offloads_parameters)
        assert resolved.accumulation_precision == "fp32"
        assert resolved.accumulation_steps == 32


def test_deepspeed_itself_reads_the_settings_as_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_config(["--pairs_per_step", "24", "--micro_batch_pairs", "4", "--max_grad_norm", "none"]).config
    for name, (stage, precision, *_) in EXPECTED.items():
        settings = resolve_deepspeed(config.model_copy(update={"deepspeed_config": name}), world_size=1).settings
        read = DeepSpeedConfig(settings)
        assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (
            24,
            4,
            6,
        )
        assert read.gradient_clipping == 0.0
        assert read.zero_config.stage == stage, name
        assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (precision == "bf16", precision == "fp16")
        assert read.grad_accum_dtype == "fp32"
        assert read.zero_force_ds_cpu_optimizer is False


def test_known_and_refused_keys_are_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items()}
    ours = {key.split(".")[1] for key in KNOWN_KEYS if key.startswith("zero_optimization.")}
    assert ours <= theirs
    assert not set(REFUSED) & set(KNOWN_KEYS)


def test_batch_and_clipping_come_from_the_run_configuration() -> None:
    config = load_config(["--pairs_per_step", "96", "--micro_batch_pairs", "4", "--max_grad_norm", "0.5"]).config
    settings = resolve_deepspeed(config, world_size=8).settings
    assert settings["train_batch_size"] == 96
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(settings)


def test_a_value_stated_twice_alike_is_taken(tmp_path: Path) -> None:
    path = changed(tmp_path, "zero2_bf16", train_batch_size=2048, gradient_clipping=1)
    assert (
        resolve_deepspeed(load_config(["--deepspeed_config", path]).config, world_size=16).settings["gradient_clipping"]
        == 1
    )


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("zero2_bf16", {"gradient_cliping": 1}, "gradient_cliping is not known; did you mean gradient_clipping?"),
        ("zero2_bf16", {"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ("zero2_bf16", {"data_types__grad_acc_dtype": "fp32"}, "did you mean data_types.grad_accum_dtype?"),
        ("zero2_bf16", {"zero_optimization__reduce_bucket": 1}, "did you mean zero_optimization.reduce_bucket_size"),
        (
            "zero2_bf16",
            {"bf16__enabled": "auto"},
            'bf16.enabled must have a value; "auto" is allowed only for train_batch_size',
        ),
        ("zero2_bf16", {"zero_optimization__stage": "auto"}, "zero_optimization.stage must have a value"),
        (
            "zero2_bf16",
            {"train_batch_size": 2000},
            "train_batch_size is 2000, but the run configuration sets it to 2048",
        ),
        (
            "zero2_bf16",
            {"gradient_clipping": 0.5},
            "gradient_clipping is 0.5, but the run configuration sets it to 1.0",
        ),
        ("zero2_bf16", {"train_batch_size": 4.5}, "train_batch_size = 4.5"),
        ("zero2_bf16", {"zero_optimization__reduce_bucket_size": True}, "reduce_bucket_size = True"),
        ("zero2_bf16", {"zero_optimization__allgather_bucket_size": 5}, "allgather_bucket_size = 5"),
        ("zero2_bf16", {"zero_optimization__stage": 0}, "zero_optimization.stage = 0: Input should be 1, 2 or 3"),
        ("zero2_bf16", {"zero_optimization__offload_param": {"device": "cpu"}}, "no effect at stage 2, only at 3"),
        ("zero3_bf16", {"zero_optimization__allgather_bucket_size": 2}, "no effect at stage 3, only at 1 and 2"),
        ("zero1_bf16", {"zero_optimization__overlap_comm": True}, "overlap_comm has no effect at stage 1 with bf16"),
        ("zero3_bf16", {"bf16__check_grad_overflow": True}, "bf16.check_grad_overflow has no effect at stage 3"),
        ("zero2_bf16", {"fp16__enabled": True}, "bf16.enabled and fp16.enabled are both true"),
        ("zero2_bf16", {"data_types__grad_accum_dtype": "fp16"}, "with bf16 weights it must be bf16 or fp32"),
        ("zero2_fp16", {"fp16__loss_scale": 128}, "fp16.hysteresis has no effect with a fixed loss_scale 128"),
        ("zero3_bf16", {"zero_optimization__zero_hpz_partition_size": 6}, "does not divide 16 ranks"),
        ("zero2_bf16", {"zero_force_ds_cpu_optimizer": True}, "refuses torch's AdamW"),
        ("zero2_bf16", {"optimizer": {"type": "Adam"}}, "optimizer is not accepted: the run configuration sets it"),
        ("zero2_bf16", {"activation_checkpointing": {}}, "give --model.gradient_checkpointing"),
        ("zero2_bf16", {"bf16__bf16_optimizer_states": True}, "are lost in bf16 master weights"),
    ],
)
def test_what_deepspeed_would_swallow_is_refused(
    tmp_path: Path, base: str, changes: dict[str, Any], message: str
) -> None:
    path = changed(tmp_path, base, **changes)
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed(load_config(["--deepspeed_config", path]).config, world_size=16)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bf16": {"enabled": true}, "bf16": {}}', "bf16 is given twice"),
        ("{", "is not valid JSON"),
        ("[]", "must contain names and values, not a list"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        resolve_deepspeed(load_config(["--deepspeed_config", str(path)]).config, world_size=1)


def test_an_unknown_name_lists_the_files() -> None:
    with pytest.raises(ConfigError, match=r"zero1_bf16, .*zero3_offload.* did you mean zero2_bf16"):
        resolve_deepspeed(load_config(["--deepspeed_config", "zero2bf16"]).config, world_size=1)


@pytest.mark.parametrize(
    ("pairs", "micro", "world_size", "message"),
    [
        (
            100,
            8,
            4,
            "is not a multiple of micro_batch_pairs 8 x 4 ranks = 32; the nearest values that would fit: 96 and 128",
        ),
        (100, 8, 4, "or keep 100 with micro_batch_pairs 5"),
        (4, 8, 1, "4 is not a multiple of micro_batch_pairs 8 x 1 rank = 8; the nearest value that would fit: 8"),
    ],
)
def test_a_batch_that_does_not_divide_names_what_would(pairs: int, micro: int, world_size: int, message: str) -> None:
    config = load_config(["--pairs_per_step", str(pairs), "--micro_batch_pairs", str(micro)]).config
    with pytest.raises(ConfigError) as caught:
        accumulation(config, world_size=world_size)
    assert message in str(caught.value)


def test_missing_ranks_are_an_error() -> None:
    config = load_config(["--expected_world_size", "16"]).config
    with pytest.raises(ConfigError, match="expected_world_size is 16, but the launch has 1 rank"):
        resolve_deepspeed(config, world_size=1)


@pytest.mark.parametrize("kind", ["adamw_8bit", "lion", "lion_8bit"])
def test_optimizers_that_deepspeed_does_not_know_are_allowed_and_not_offloaded(kind: str, tmp_path: Path) -> None:
    config = load_config(["--optimizer.type", kind]).config
    assert resolve_deepspeed(config, world_size=16).settings["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in resolve_deepspeed(load_config([]).config, world_size=16).settings
    offloading = load_config(["--optimizer.type", kind, "--deepspeed_config", "zero3_offload"]).config
    with pytest.raises(ConfigError, match=f"offload_optimizer with optimizer.type {kind}, .*choose adamw"):
        resolve_deepspeed(offloading, world_size=16)
    path = changed(tmp_path, "zero2_bf16", zero_allow_untested_optimizer=False)
    with pytest.raises(ConfigError, match="zero_allow_untested_optimizer is False"):
        resolve_deepspeed(load_config(["--optimizer.type", kind, "--deepspeed_config", path]).config, world_size=16)


def test_a_shared_reference_keeps_what_a_file_says_of_gathering_at_any_stage(tmp_path: Path) -> None:
    threshold = {"zero_optimization__stage3_param_persistence_threshold": 0}
    for base in ("zero1_bf16", "zero2_bf16", "zero3_bf16"):
        path = changed(tmp_path, base, **threshold)
        config = load_config(["--deepspeed_config", path, "--reference.residency", "zero3"]).config
        settings = reference_settings(resolve_deepspeed(config, world_size=16).settings)
        zero = settings["zero_optimization"]
        assert (zero["stage"], zero["stage3_param_persistence_threshold"]) == (3, 0)
        assert settings["bf16"]["enabled"]
        assert not {"optimizer", "scheduler", "gradient_clipping", "data_types", "checkpoint"} & settings.keys()
        assert not {"reduce_bucket_size", "contiguous_gradients", "offload_optimizer"} & zero.keys()
        # off below stage 3 for the gradients' sake, which a reference has none of
        assert zero.get("overlap_comm") is (True if base == "zero3_bf16" else None)
    config = load_config(["--deepspeed_config", changed(tmp_path, "zero2_bf16", **threshold)]).config
    with pytest.raises(ConfigError, match="stage3_param_persistence_threshold has no effect at stage 2"):
        resolve_deepspeed(config, world_size=16)


def test_a_shared_reference_rests_on_the_host_where_the_policys_weights_do() -> None:
    config = load_config(["--deepspeed_config", "zero3_offload"]).config
    settings = resolve_deepspeed(config, world_size=16).settings
    assert reference_settings(settings)["zero_optimization"]["offload_param"]["device"] == "cpu"
