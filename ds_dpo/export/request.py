"""What may be asked of an export, and which options belong to which format; imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError, cut
from ds_dpo.precision import Precision
from ds_dpo.storage.best_mark import BEST, Best

MOST_DIGITS = 18  # of a step
FILE_SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to export: source is a run, a checkpoint or a DeepSpeed save_dir; base and vae override the run's own.

    keys: prefix of the denoiser's parameters in a checkpoint that holds more. max_shard_gb: in 10^9 bytes.
    """

    source: Path
    out: Path
    step: int | Best | None = None
    dtype: Precision = "fp16"
    format: str = "denoiser"
    base: str | None = None
    vae: str | None = None
    variant: str | None = None
    max_shard_gb: float | None = None
    keys: str | None = None
    ema: bool = False
    base_file: Path | None = None
    rank: int | None = None
    lora_alpha: float | None = None
    lora_naming: str = "diffusers"
    lora_targets: str = "all"
    license: str | None = None
    push_to_hub: str | None = None
    private: bool = False


SOURCE_OPTIONS = frozenset({"source", "step", "base", "keys", "ema", "lora_alpha"})
ALWAYS = SOURCE_OPTIONS | {"out", "format", "dtype", "license", "push_to_hub", "private"}
FORMAT_OPTIONS: dict[str, frozenset[str]] = {
    "denoiser": ALWAYS | {"variant", "max_shard_gb"},
    "pipeline": ALWAYS | {"variant", "max_shard_gb", "vae"},
    "single-file": ALWAYS | {"base_file"},
    "lora": ALWAYS | {"rank", "lora_naming", "lora_targets"},
}
FIRST_FORMAT_NAMES = {"unet": "denoiser"}  # of earlier versions, still taken
LORA_NAMINGS = ("diffusers", "kohya")
ALL_TARGETS = "all"
# layers that a computed LoRA has, by what the names of their modules contain
LORA_TARGETS = {ALL_TARGETS: ("",), "attention": (".attentions.", ".attn.", ".attn2.")}
FILE_FORMATS = ("single-file", "lora")  # formats that fit into one file


def step_or_best(text: str) -> int | Best:
    """Return a step of 0 or more, or the word best, for argparse."""
    if text == BEST:
        return BEST
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"{cut(text)!r}; a step or {BEST} would fit")
    return int(text)


def format_name(name: str) -> str:
    """Return the present name of a format, given that or its first one."""
    return FIRST_FORMAT_NAMES.get(name, name)


def is_one_file(request: Request) -> bool:
    """Return whether the export is a single file rather than a folder."""
    return request.out.suffix == FILE_SUFFIX


def check_options(request: Request) -> None:
    """Raise ConfigError for an option that the format would ignore, and for impossible values."""
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name not in FORMAT_OPTIONS[request.format] and value != field.default:
            takers = [name for name, options in FORMAT_OPTIONS.items() if field.name in options]
            raise ConfigError(
                f"--{field.name} {value}: --format {request.format} ignores it; give it with {' or '.join(takers)}"
            )
    if is_one_file(request) and request.format not in FILE_FORMATS:
        raise ConfigError(
            f"{request.out}: --format {request.format} writes a folder; give a name without {FILE_SUFFIX}"
        )
    if request.push_to_hub is not None and is_one_file(request):
        raise ConfigError(
            f"--push_to_hub {request.push_to_hub}: {request.out} is a file; give a folder, which also gets a model card"
        )
    if request.private and request.push_to_hub is None:
        raise ConfigError("--private has no effect without an upload; add --push_to_hub OWNER/NAME")
    if request.variant is not None and not re.fullmatch(r"\w+", request.variant):
        raise ConfigError(
            f"--variant {request.variant!r}: must be a word such as fp16, because it becomes part of file names"
        )
    for name in ("max_shard_gb", "rank", "lora_alpha"):
        _check_positive(name, getattr(request, name))


def _check_positive(name: str, value: Any) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"--{name} {value} must be above 0")
