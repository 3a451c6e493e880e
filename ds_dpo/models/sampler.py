"""The sampler that this project uses everywhere: in training, in evaluation and for the miniature's pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler

DDIM_SETTINGS: dict[str, Any] = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}


def ddim_from(config: Mapping[str, Any]) -> DDIMScheduler:
    """Return DDIM over the noise schedule of a scheduler's configuration.

    Trailing timesteps begin at the noisiest one, which leading timesteps leave out (arXiv:2305.08891, section 3.3).
    """
    scheduler: DDIMScheduler = DDIMScheduler.from_config(dict(config), **DDIM_SETTINGS)
    return scheduler
