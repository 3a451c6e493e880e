"""What conditions a denoiser besides the prompt: sizes of images, and the scale of guidance of a distilled one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_dpo.config.families import LIMITS
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.families.family import Extras
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.pipelines.pretrained import open_pipeline

PLAIN_GUIDANCE = 1.0  # v_u + w (v_c - v_u) is v_c at w = 1: the prediction for the prompt, as a denoising error has it
GUIDANCE = "guidance"


def extras_of(model: ModelConfig) -> Extras:
    """Return the function from the time ids of N images to what else conditions them. Raises ModelError as guidance_of.

    All images of a run get the same guidance, so that policy and reference, chosen and rejected have it in common.
    """
    return with_guidance(FAMILIES[model.family].extras, guidance_of(model))


def with_guidance(extras: Extras, guidance: float | None) -> Extras:
    """Return a family's extras, with a scale of guidance (N,), fp32, unless it is None."""
    if guidance is None:
        return extras

    def found(time_ids: Tensor) -> Mapping[str, Tensor]:
        scales = torch.full((len(time_ids),), guidance, dtype=torch.float32, device=time_ids.device)
        return {**extras(time_ids), GUIDANCE: scales}

    return found


def takes_guidance(config: Mapping[str, Any]) -> bool:
    """Return whether a denoiser of this diffusers configuration is conditioned on a scale of guidance."""
    return config.get("guidance_embeds") is True


def guidance_of(model: ModelConfig) -> float | None:
    """Return the scale of guidance that a run gives to its denoiser; None if that takes none.

    Raises ModelError if model.guidance is given for such a one, as FLUX.1-schnell is.
    """
    if not LIMITS[model.family].takes_guidance:
        return None  # RunConfig refuses a value
    if takes_guidance(open_pipeline(model).denoiser().config):
        return PLAIN_GUIDANCE if model.guidance is None else model.guidance
    if model.guidance is not None:
        raise ModelError(
            f"model.guidance {model.guidance:g}, but the {FAMILIES[model.family].denoiser.title} of {model.pretrained} "
            "takes no scale of guidance (guidance_embeds is not true in its config); leave it out"
        )
    return None


def describe_guidance(model: ModelConfig) -> list[str]:
    """Return a line on the guidance of a run, and no line for a denoiser that takes none. Raises ModelError."""
    guidance = guidance_of(model)
    if guidance is None:
        return []
    why = "1 if unset, the plain prediction" if model.guidance is None else "model.guidance"
    return [f"guidance: policy and reference are given {guidance:g} for chosen and rejected alike ({why})"]
