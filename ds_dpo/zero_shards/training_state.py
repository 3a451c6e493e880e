"""What DeepSpeed saves besides tensors: counters, rates, schedule, loss scale, the caller's state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.errors import CheckpointError

RATES = ("lr", "initial_lr")  # the values of an optimizer's groups that change during a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Plain values, the same on all ranks.

    global_steps: updates, skipped_steps of which were skipped. rates: those of each of the optimizer's groups, under
    the names of RATES. schedule: torch's state of the learning-rate schedule. loss_scaler: attributes of DeepSpeed's,
    {} without one. client_state: top level of the model states, with what the caller of save_checkpoint gave.
    """

    global_steps: int
    skipped_steps: int
    global_samples: int
    rates: tuple[Mapping[str, float], ...]
    schedule: Mapping[str, Any]
    loss_scaler: Mapping[str, Any]
    client_state: Mapping[str, Any]


def read_training_state(model: Mapping[str, Any], optimizer: Mapping[str, Any], *, folder: Path) -> TrainingState:
    """Return the training state from the first rank's two files.

    model: content of its model states. optimizer: the inner dictionary of its optimizer states.
    Raises CheckpointError if they lack one of these values.
    """
    try:
        groups = (optimizer.get("base_optimizer_state") or optimizer["optimizer_state_dict"])["param_groups"]
        scaler = optimizer.get("loss_scaler")
        return TrainingState(
            global_steps=int(model["global_steps"]),
            skipped_steps=int(model["skipped_steps"]),
            global_samples=int(model["global_samples"]),
            rates=tuple({name: float(group[name]) for name in RATES if name in group} for group in groups),
            schedule=dict(model["lr_scheduler"]),
            loss_scaler={} if scaler is None else dict(vars(scaler)),
            client_state=model,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: lacks a value that a resumed run needs ({type(error).__name__}: {error})"
        ) from error
