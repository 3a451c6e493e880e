"""Parts of a run that have their own state, which checkpoints save beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.errors import DsDpoError
from ds_dpo.storage.state_files import StateFile


class RunPart:
    """A part of a run with its own state. All ranks call each method together; by default a method does nothing.

    name: the name of the state in a checkpoint.
    """

    name: str

    def begin(self, step: int) -> None:
        """Called once, after restore and before the first step. step: the last finished step, 0 for a new run."""

    def before_backward(self, pair_ids: Tensor, timesteps: Tensor, pair_quantities: Mapping[str, Tensor]) -> None:
        """Called after each forward pass with (B,) tensors on the device.

        Do not read their values here: that would synchronise with the device.
        """

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Called after each optimizer step. Returns further metrics by name.

        metrics: those of the whole step over all ranks; each rank gets the same numbers.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return the state as plain values, for restore."""
        return {}

    def files(self) -> list[StateFile]:
        """Return this rank's further files of a checkpoint, not yet written; they may share the part's tensors."""
        return []

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Continue from a checkpoint. state: as returned by state(). folder: holds the files of files()."""

    def take_error(self) -> DsDpoError | None:
        """Return the error that ends the run when this step is saved, or None; once, and on all ranks."""
        return None

    def rewind(self, step: int) -> None:
        """Remove records of later steps: the run has gone back to this step. restore is called next."""
