"""The learning rate over optimizer steps, by diffusers' schedules."""

from __future__ import annotations

from typing import Any

import torch

from ds_dpo.config.optimization import SCHEDULE_FIELDS, ScheduleConfig

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

    max_train_steps: the end of a decaying schedule without decay_steps. Source: diffusers.optimization.
    """
    from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    values = {**config.model_dump(), "decay_steps": config.decay_steps or max_train_steps}
    arguments = {_ARGUMENTS[field]: values[field] for field in SCHEDULE_FIELDS[config.name]}
    return TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(config.name)](optimizer, **arguments)
