"""The scheduler configuration of a flow model: what it says of the forward process, and the sampler that it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from ds_dpo.diffusion.flow import Flow
from ds_dpo.diffusion.shift import Shift, ShiftByTokens
from ds_dpo.errors import ModelError, shown

FLOW = "flow"
FLOW_PREDICTION = "flow_prediction"  # diffusers' name, in samplers that serve noise schedules too
MOST_TOKENS = 2**20  # of an image; a shift must have a factor up to there
MAX_TIMESTEPS = 100_000
LARGEST = 1e9  # number of a configuration


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's configuration is of a rectified flow, whatever the sampler."""
    if str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("use_flow_sigmas") is True:
        return True
    is_of_matching = "shift" in config and "beta_schedule" not in config  # a live sampler may not name its class
    return is_of_matching or config.get("prediction_type") in (FLOW, FLOW_PREDICTION)


def flow_of(config: Mapping[str, Any], *, name: str) -> Flow:
    """Return the flow of a scheduler's configuration, with its shift as the sampler has it.

    name: of the model, for messages. A stretch to shift_terminal depends on the number of sampling steps, and is left
    out. Raises ModelError for settings that give no flow.
    """
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
        raise ModelError(
            f"{name}: its scheduler has num_train_timesteps {shown(steps)}; it must be a whole number from 1 to "
            f"{MAX_TIMESTEPS}"
        )
    if config.get("invert_sigmas"):
        raise ModelError(f"{name}: its scheduler has invert_sigmas, in which 1 is a clean image; it cannot be trained")
    if config.get("use_dynamic_shifting"):
        return Flow(num_train_timesteps=steps, shift=Shift(by_tokens=shift_by_tokens(config, name=name)))
    factor = _number(config, "shift" if "shift" in config else "flow_shift", 1.0, name)
    if factor <= 0:
        raise ModelError(f"{name}: its scheduler has shift {shown(factor)}; it must be above 0")
    return Flow(num_train_timesteps=steps, shift=Shift(factor=factor))


def shift_by_tokens(config: Mapping[str, Any], *, name: str) -> ShiftByTokens:
    """Return the shift that grows with the resolution, as a scheduler's configuration has it, else as diffusers does.

    Raises ModelError for numbers that give no factor above 0.
    """
    plain = ShiftByTokens()
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ModelError(f"{name}: its scheduler has time_shift_type {shown(kind)}; exponential or linear would fit")
    found = ShiftByTokens(
        base_tokens=round(_number(config, "base_image_seq_len", plain.base_tokens, name)),
        base_shift=_number(config, "base_shift", plain.base_shift, name),
        max_tokens=round(_number(config, "max_image_seq_len", plain.max_tokens, name)),
        max_shift=_number(config, "max_shift", plain.max_shift, name),
        exponential=kind == "exponential",
    )
    try:
        factors = [found.factor(tokens) for tokens in (1, MOST_TOKENS)]
    except (ZeroDivisionError, OverflowError):
        factors = [math.inf]
    if not all(0 < factor < math.inf for factor in factors):
        raise ModelError(
            f"{name}: its scheduler's base_shift {found.base_shift:g} at {found.base_tokens} tokens and max_shift "
            f"{found.max_shift:g} at {found.max_tokens} give no shift for images of 1 to {MOST_TOKENS} tokens"
        )
    return found


def flow_sampler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Return Euler's sampler over the times of a flow's scheduler configuration, whatever sampler that belongs to."""
    known = {name: value for name, value in config.items() if name in _settings_of_euler()}
    if "shift" not in config and "flow_shift" in config:
        known["shift"] = config["flow_shift"]
    scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(known)
    return scheduler


def _settings_of_euler() -> set[str]:
    return set(FlowMatchEulerDiscreteScheduler().config)


def _number(config: Mapping[str, Any], key: str, default: float, name: str) -> float:
    value = config.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -LARGEST <= value <= LARGEST:  # written so that NaN fails as well
        raise ModelError(f"{name}: its scheduler has {key} {shown(value)}; a number would fit")
    return float(value)
