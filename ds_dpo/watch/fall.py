"""Detect that the metric that chooses the best checkpoint has fallen far below its best value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_dpo.checkpoints.best import BestCheckpoint


@dataclass(frozen=True, kw_only=True)
class Fall:
    """A tripped rule. best_step: step of the best value, to which a roll-back may go."""

    best_step: int
    sentence: str


class FallWatch:
    """Trips after `patience` evaluations in a row that are worse than the best by more than max_fall."""

    def __init__(self, best: BestCheckpoint, *, max_fall: float, patience: int) -> None:
        self._best, self._max_fall, self._patience = best, max_fall, patience
        self._count = 0
        self._taken = 0

    def after_step(self, step: int) -> Fall | None:
        """Take the newest evaluation, if it is new; all ranks call it after each step."""
        evaluated = step - self._best.delay_steps
        if evaluated <= self._taken or not self._best.is_due(evaluated):
            return None
        self._taken = evaluated
        readings = self._best.readings().up_to(evaluated)
        if evaluated not in readings.by_step:
            return None  # a scorer gave no number: it neither counts nor ends the row
        fall = readings.fall(evaluated)
        self._count = self._count + 1 if fall > self._max_fall else 0
        if self._count < self._patience:
            return None
        best_step = readings.best()
        assert best_step is not None, "the evaluated step has a value"
        times = "1 evaluation" if self._patience == 1 else f"{self._patience} evaluations"
        self._count = 0  # an action gets the same number of evaluations to work
        return Fall(
            best_step=best_step,
            sentence=f"watchdog, step {step}: {self._best.metric} is {readings.by_step[evaluated]:.4g}, which is worse "
            f"than its best value, {readings.by_step[best_step]:.4g} at step {best_step}, by more than "
            f"{self._max_fall:g} for {times}",
        )

    def rewind(self, step: int) -> None:
        """Continue after an earlier step."""
        self._count, self._taken = 0, min(self._taken, step)

    def state(self) -> dict[str, Any]:
        """Return the row so far, and the newest evaluation that was taken."""
        return {"count": self._count, "taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with what state() returned."""
        self._count, self._taken = int(state["count"]), int(state["taken"])
