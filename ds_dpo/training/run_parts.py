"""The parts of a run as one: each follows the steps and has a state in the checkpoints, besides the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.batch import PreferenceBatch
from ds_dpo.checkpoints.store import LoadedCheckpoint
from ds_dpo.errors import DsDpoError
from ds_dpo.run_part import RunPart
from ds_dpo.storage.state_files import StateFile
from ds_dpo.watch.watchdog import Verdict, Watchdog


class RunParts:
    """The parts of a run, in the order in which they see each step; all ranks call each method together."""

    def __init__(self, parts: Sequence[RunPart], *, watchdog: Watchdog | None = None) -> None:
        """watchdog: the only part that can ask for a roll-back; it comes last."""
        self._parts: list[RunPart] = [*parts, *([] if watchdog is None else [watchdog])]
        self.watchdog = watchdog

    def begin(self, step: int) -> None:
        """See RunPart.begin."""
        for part in self._parts:
            part.begin(step)

    def before_backward(self, batch: PreferenceBatch, pair_quantities: Mapping[str, Tensor]) -> None:
        """See RunPart.before_backward."""
        for part in self._parts:
            part.before_backward(batch.pair_ids, batch.timesteps, pair_quantities)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the step's metrics and those of each part; a part also gets the metrics of earlier parts."""
        found = dict(metrics)
        for part in self._parts:
            found |= part.after_step(step, found)
        return found

    def take_error(self) -> DsDpoError | None:
        """Return the first error of a part that must end the run, or None."""
        return next((error for part in self._parts if (error := part.take_error()) is not None), None)

    def take_verdict(self) -> Verdict | None:
        """Return the watchdog's verdict on this step, once."""
        return None if self.watchdog is None else self.watchdog.take_verdict()

    def states(self) -> dict[str, dict[str, Any]]:
        """Return each part's plain values by its name, for a checkpoint."""
        return {part.name: part.state() for part in self._parts}

    def files(self) -> list[StateFile]:
        """Return this rank's files of all parts, for a checkpoint."""
        return [file for part in self._parts for file in part.files()]

    def go_back(self, saved: LoadedCheckpoint, *, step: int) -> None:
        """Rewind all parts to a step, and restore all but the watchdog from its checkpoint."""
        states = states_of(saved)
        for part in self._parts:
            part.rewind(step)
            if part is not self.watchdog:
                restore_part(part, states, saved.folder)


def states_of(saved: LoadedCheckpoint) -> Mapping[str, Any]:
    """Return the states of a checkpoint's parts by name."""
    states: Mapping[str, Any] = saved.client_state.get("parts", {})
    return states


def restore_part(part: RunPart, states: Mapping[str, Any], folder: Path) -> None:
    """Restore a part from a checkpoint; a part that is not in it begins without a state."""
    if part.name in states:
        part.restore(states[part.name], folder)
