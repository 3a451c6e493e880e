"""Read a file of ds_configs/ strictly: no unknown key, no misplaced "auto", no option without effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import hjson
from pydantic import BaseModel, ValidationError

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.documents import read_document
from ds_dpo.config.fields import did_you_mean
from ds_dpo.engine.settings_schema import (
    AUTO_KEYS,
    GATHERING_OPTIONS_AT_ANY_STAGE,
    REFUSED,
    DeepSpeedFile,
    ZeroOptimization,
)
from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.precision import Precision

# beside the package, both in a checkout and after installation
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

# HJSON is read in Python, as slowly as YAML: a larger file could take longer than 10 s.
MAX_BYTES = 2**18
# The options that DeepSpeed's BF16_Optimizer reads; DeepSpeed uses it for ZeRO-1 with bf16 and fp32 accumulation.
BF16_OPTIMIZER_OPTIONS = ("stage", "allgather_bucket_size")


def deepspeed_config_path(name: str) -> Path:
    """Return the file for a name in ds_configs/ or a path. Raises ConfigError with the known names."""
    path = Path(resolve_asset(name))
    for candidate in (DS_CONFIGS / f"{name}.json", DS_CONFIGS / name, path):
        if candidate.is_file():
            return candidate
    names = sorted(file.stem for file in DS_CONFIGS.glob("*.json"))
    near = did_you_mean(path.stem, names)
    raise ConfigError(f"deepspeed_config {name} is neither in ds_configs/ ({', '.join(names)}) nor a file{near}")


def read_deepspeed_file(path: Path) -> DeepSpeedFile:
    """Read and check a file: JSON with comments, as DeepSpeed reads it. Raises ConfigError."""
    document = read_document(path, dict, _parse, language="JSON", max_bytes=MAX_BYTES)
    for key, value in _flat(document):
        _check_key(key, path)
        if value == "auto" and key not in AUTO_KEYS:
            raise ConfigError(
                f'{path}: {cut(key)} must have a value; "auto" is allowed only for {", ".join(AUTO_KEYS)}'
            )
    stated = {key: value for key, value in document.items() if value != "auto"}
    try:
        return DeepSpeedFile.model_validate(stated)
    except ValidationError as error:
        problems = [_problem(one) for one in error.errors()]
        raise ConfigError("\n  ".join([f"{path} is not valid:", *problems])) from None


def _parse(text: str) -> Any:
    return hjson.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known: set[str] = set()
    for name, _ in pairs:
        if name in known:
            raise ValueError(f"{cut(name)} is given twice")
        known.add(name)
    return dict(pairs)


def _problem(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{key} must be given"
    return f"{key} = {shown(error['input'])}: {str(error['msg']).removeprefix('Value error, ')}"


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key by dotted name, each block before its keys."""
    for key, value in document.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _known_keys(block: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in block.model_fields.items():
        yield prefix + name
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _known_keys(part, f"{prefix}{name}.")


KNOWN_KEYS = tuple(_known_keys(DeepSpeedFile))


def _check_key(key: str, path: Path) -> None:
    if key in REFUSED:
        raise ConfigError(f"{path}: {key} is not accepted: {REFUSED[key]}")
    if key not in KNOWN_KEYS:
        beside = [known for known in KNOWN_KEYS if known.rpartition(".")[0] == key.rpartition(".")[0]]
        near = did_you_mean(key, beside) or did_you_mean(key, KNOWN_KEYS) or f"; known here: {', '.join(beside)}"
        raise ConfigError(f"{path}: {cut(key)} is not known{near}")


def precision_of_file(file: DeepSpeedFile) -> Precision:
    """Return the precision of weights and predictions."""
    if file.bf16 and file.bf16.enabled:
        return "bf16"
    return "fp16" if file.fp16 and file.fp16.enabled else "fp32"


# ---- options without effect ----


def ignored_options(file: DeepSpeedFile, *, world_size: int, shares_reference: bool = False) -> Iterator[str]:
    """Yield a line for each option that has no effect or does not work with the stage, precision or ranks.

    shares_reference: a reference of residency zero3 uses some options of stage 3, whatever the policy's stage.
    """
    used_by_reference = GATHERING_OPTIONS_AT_ANY_STAGE if shares_reference else ()
    yield from _precisions(file)
    yield from _options_of_other_stages(file.zero_optimization, apart_from=used_by_reference)
    if _uses_bf16_optimizer(file):
        for name in _stated(file.zero_optimization, apart_from=(*BF16_OPTIMIZER_OPTIONS, *used_by_reference)):
            yield (
                f"zero_optimization.{name} has no effect at stage 1 with bf16 and fp32 accumulation, only "
                f"{' and '.join(BF16_OPTIMIZER_OPTIONS)}; leave it out"
            )
    if file.zero_force_ds_cpu_optimizer:
        yield "zero_force_ds_cpu_optimizer true refuses torch's AdamW, which every run uses; leave it out"
    group = file.zero_optimization.zero_hpz_partition_size
    if group is not None and world_size % group:
        yield (
            f"zero_optimization.zero_hpz_partition_size {group} does not divide {world_size} ranks; "
            "give the number of GPUs per node"
        )


def _precisions(file: DeepSpeedFile) -> Iterator[str]:
    if file.bf16 and file.fp16 and file.bf16.enabled and file.fp16.enabled:
        yield "bf16.enabled and fp16.enabled are both true; keep one"
    for name, block in (("bf16", file.bf16), ("fp16", file.fp16)):
        if block is not None and not block.enabled and _stated(block, apart_from=("enabled",)):
            yield f"{name} has settings, but enabled is false; set it to true or leave the block out"
    precision = precision_of_file(file)
    if file.data_types and file.data_types.grad_accum_dtype not in (precision, "fp32"):
        fitting = precision if precision == "fp32" else f"{precision} or fp32"
        accumulated = file.data_types.grad_accum_dtype
        yield f"data_types.grad_accum_dtype {accumulated}: with {precision} weights it must be {fitting}"
    checks_anyway_or_never = file.zero_optimization.stage == 3 or _uses_bf16_optimizer(file)
    if file.bf16 and "check_grad_overflow" in file.bf16.model_fields_set and checks_anyway_or_never:
        yield f"bf16.check_grad_overflow has no effect at stage {file.zero_optimization.stage}; leave it out"
    if file.fp16 and file.fp16.loss_scale:
        for name in _stated(file.fp16, apart_from=("enabled", "loss_scale")):
            yield f"fp16.{name} has no effect with a fixed loss_scale {file.fp16.loss_scale:g}; loss_scale 0 is dynamic"


def _options_of_other_stages(zero: ZeroOptimization, *, apart_from: tuple[str, ...]) -> Iterator[str]:
    for name in _stated(zero, apart_from=("stage", *apart_from)):
        extra = ZeroOptimization.model_fields[name].json_schema_extra
        assert isinstance(extra, dict), f"{name} is made with option()"
        stages = extra["stages"]
        assert isinstance(stages, list)
        if zero.stage not in stages:
            where = " and ".join(map(str, stages))
            yield f"zero_optimization.{name} has no effect at stage {zero.stage}, only at {where}; leave it out"


def _uses_bf16_optimizer(file: DeepSpeedFile) -> bool:
    """Source: deepspeed/runtime/engine.py, _do_optimizer_sanity_check."""
    zero = file.zero_optimization
    accumulates_in_fp32 = file.data_types is not None and file.data_types.grad_accum_dtype == "fp32"
    is_bf16 = precision_of_file(file) == "bf16"
    return zero.stage == 1 and is_bf16 and accumulates_in_fp32 and zero.offload_optimizer is None


def _stated(block: BaseModel, *, apart_from: tuple[str, ...]) -> list[str]:
    return sorted(block.model_fields_set.difference(apart_from))
