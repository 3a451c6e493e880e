"""The metadata of a single file: the modelspec.* entries that A1111, ComfyUI and model sites show."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from ds_dpo.models.families.table import family_of

# https://github.com/Stability-AI/ModelSpec
SPEC_VERSION = "1.0.0"
IMPLEMENTATION_LDM = "https://github.com/Stability-AI/generative-models"
IMPLEMENTATION_DIFFUSERS = "https://github.com/huggingface/diffusers"
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers -> modelspec
LATENT_SCALE = 8  # pixels per latent
HASH = "modelspec.hash_sha256"


def describe_model(
    config: Mapping[str, Any], *, title: str, prediction_type: str | None, is_lora: bool = False
) -> dict[str, str]:
    """Return the modelspec.* entries of a tuned UNet, or of a LoRA for one, with the present time in UTC.

    prediction_type: as diffusers' scheduler names it; None leaves it out.
    """
    entries = {
        "sai_model_spec": SPEC_VERSION,
        "architecture": _architecture(config, prediction_type, suffix="/lora" if is_lora else ""),
        "implementation": IMPLEMENTATION_DIFFUSERS if is_lora else IMPLEMENTATION_LDM,
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "resolution": _resolution(config.get("sample_size")),
        "prediction_type": None if prediction_type is None else PREDICTION_TYPES.get(prediction_type),
    }
    return {f"modelspec.{name}": value for name, value in entries.items() if value is not None}


def _architecture(config: Mapping[str, Any], prediction_type: str | None, *, suffix: str) -> str | None:
    family = family_of(config)
    if family is None:
        return None
    published = family.published
    return published.architecture_of_prediction.get(prediction_type or "", published.architecture) + suffix


def _resolution(sample_size: int | Sequence[int] | None) -> str | None:
    if sample_size is None:
        return None
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return f"{LATENT_SCALE * width}x{LATENT_SCALE * height}"


def merge_metadata(base: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Return the base file's metadata (author, license, thumbnail ...) without its checksum, updated with our own."""
    return {name: value for name, value in base.items() if name != HASH} | dict(own)
