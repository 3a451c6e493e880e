"""What changes beside the weights as a run goes on, and so belongs to its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.errors import DsDpoError
from ds_dpo.storage.state_files import StateFile


class RunPart:
    """A part of a run with a state of its own; all ranks call each method together, and by default it does nothing.

    name: under which a checkpoint keeps the state.
    """

    name: str

    def begin(self, step: int) -> None:
        """Start, or go on after a step: called once, after restore, when all is ready and nothing trained yet."""

    def before_backward(self, pair_ids: Tensor, timesteps: Tensor, pair_quantities: Mapping[str, Tensor]) -> None:
        """Look at one of this rank's micro-batches, (B,) each and on the device; to read them would wait for it."""

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Take in an optimizer step; returns further metrics by name.

        metrics: of the whole step over all ranks, the same numbers on each rank.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return plain values that restore takes back."""
        return {}

    def files(self) -> list[StateFile]:
        """Return further files of a checkpoint, this rank's, unwritten; their states may be the part's own."""
        return []

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on from a checkpoint: what state() returned, and the folder with the files of files()."""

    def take_error(self) -> DsDpoError | None:
        """Return, once and on all ranks, what is to end the run as soon as this step is saved."""
        return None

    def rewind(self, step: int) -> None:
        """Forget what was noted elsewhere of later steps: the run has gone back to this one, restore follows."""
