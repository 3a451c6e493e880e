"""A reference that follows the policy at every step: a moving average of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ds_dpo.distributed.together import said_once
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import ReferenceChangedError
from ds_dpo.models.reference import FrozenCopy, assert_own_storage
from ds_dpo.run_part import RunPart
from ds_dpo.storage.state_files import StateFile


class MovingReference(RunPart):
    """After each applied update the reference becomes decay x reference + (1 - decay) x policy.

    The engine keeps that average in fp32, divided among the ranks as the master weights are, and saves it with them;
    the reference's own weights are its rounding. It is its own guard, since the two must always agree.
    Source: arXiv:2404.09656, the soft update, whose alpha is 1 - decay.
    """

    name = "moving_reference"

    def __init__(self, reference: FrozenCopy, *, engine: Engine, policy: nn.Module, decay: float) -> None:
        """Start from the reference's weights. policy: the module in the engine, which must share no memory with it."""
        assert_own_storage(policy, reference)
        self._reference = reference
        self._follower = engine.follow(reference.module, decay=decay)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Set the reference to the average, which the engine has updated. Returns no metrics."""
        self._write()
        return {}

    def files(self) -> list[StateFile]:
        """Return no files, because the engine saves the average; a changed reference ends the run before it is saved.

        Raises ReferenceChangedError on all ranks.
        """
        self.require_unchanged()
        return []

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Set the reference to the average that the engine has loaded."""
        self._write()

    def require_unchanged(self) -> None:
        """Raise ReferenceChangedError on all ranks if the reference of any rank is not the rounded average."""
        changed = self._follower.ranks_that_differ()
        if changed:
            ranks = ", ".join(map(str, changed))
            error = ReferenceChangedError(
                f"the reference's weights are no longer the average that they follow (rank {ranks}): its memory was "
                "written to, so the objective compared with something else; do not use this run's later checkpoints"
            )
            raise said_once(error)

    def _write(self) -> None:
        self._follower.write()
        self._reference.forget_copies()
