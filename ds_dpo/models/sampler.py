"""The samplers that this project draws with: in training, in evaluation and for the miniature's pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from ds_dpo.errors import ModelError
from ds_dpo.models.flow_scheduler import flow_sampler, is_flow

DDIM_SETTINGS: dict[str, Any] = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
Sampler: TypeAlias = DDIMScheduler | FlowMatchEulerDiscreteScheduler


def sampler_from(config: Mapping[str, Any]) -> Sampler:
    """Return the deterministic sampler of first order over a scheduler's configuration: DDIM, or Euler for a flow."""
    return flow_sampler(config) if is_flow(config) else ddim_from(config)


def ddim_from(config: Mapping[str, Any]) -> DDIMScheduler:
    """Return DDIM over the noise schedule of a scheduler's configuration.

    Trailing timesteps begin at the noisiest one, which leading timesteps leave out (arXiv:2305.08891, section 3.3).
    """
    scheduler: DDIMScheduler = DDIMScheduler.from_config(dict(config), **DDIM_SETTINGS)
    return scheduler


def euler_from(config: Mapping[str, Any]) -> Any:
    """Return Euler's sampler over a scheduler's configuration: that of flows for a flow."""
    return flow_sampler(config) if is_flow(config) else EulerDiscreteScheduler.from_config(dict(config))


def dpmpp_from(config: Mapping[str, Any]) -> Any:
    """Return DPM-Solver++ over a noise schedule's configuration.

    Raises ModelError for a flow, whose pipelines hand over times that this sampler does not take.
    """
    if is_flow(config):
        raise ModelError("the sampler dpmpp does not take a flow model's times; take model, ddim or euler")
    return DPMSolverMultistepScheduler.from_config(dict(config))
