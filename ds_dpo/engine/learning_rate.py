"""The learning rate over optimizer steps, by diffusers' schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_dpo.config.optimization import DECAYING_SCHEDULES, SCHEDULE_FIELDS, ScheduleConfig

# the names of the fields in diffusers
_ARGUMENTS = {
    "warmup_steps": "num_warmup_steps",
    "decay_steps": "num_training_steps",
    "num_cycles": "num_cycles",
    "power": "power",
    "end_rate": "lr_end",
    "step_rules": "step_rules",
}


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, max_train_steps: int) -> Any:
    """Return a LambdaLR that scales the optimizer's own rate, the peak.

    max_train_steps: the end of a decaying schedule without decay_steps. A decaying schedule keeps the value that it has
    at its end: diffusers' cosine alone would rise again. Source: diffusers.optimization.
    """
    from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    end = config.decay_steps or max_train_steps
    values = {**config.model_dump(), "decay_steps": end}
    arguments = {_ARGUMENTS[field]: values[field] for field in SCHEDULE_FIELDS[config.name]}
    schedule = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(config.name)](optimizer, **arguments)
    if config.name in DECAYING_SCHEDULES:
        schedule.lr_lambdas = [_up_to(factor, end) for factor in schedule.lr_lambdas]
    return schedule


def _up_to(factor: Callable[[int], float], end: int) -> Callable[[int], float]:
    """Return a factor of the rate by step, which stays at its value of step `end`."""

    def kept(step: int) -> float:
        return factor(min(step, end))

    return kept
