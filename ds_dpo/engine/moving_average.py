"""An exponential moving average of the fp32 master weights; each rank keeps its own part under any ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.storage.state_files import StateFile

FORMAT = 1


def average_file_name(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint folder."""
    return f"ema_rank_{rank:05d}.pt"


class MovingAverage:
    """Averages flat groups of weights over applied updates; a skipped update does not change the average.

    The k-th update keeps a share min(decay, k / (k + 9)) of the average, and the first one keeps nothing.
    Source: diffusers.training_utils.EMAModel.get_decay with its defaults.
    """

    def __init__(self, groups: Sequence[Tensor], *, decay: float) -> None:
        """Start from the weights. groups: 1-D fp32 tensors, as the rank's optimizer holds them."""
        self._groups = [group.detach().clone() for group in groups]
        self._decay = decay
        self._updates = 0

    @property
    def groups(self) -> list[Tensor]:
        """The averages, with the shapes of the groups that it started from."""
        return self._groups

    def continue_after(self, updates: int) -> None:
        """Continue the count after this number of updates, when the averages themselves have been set."""
        self._updates = updates

    @torch.no_grad()
    def update(self, groups: Sequence[Tensor]) -> None:
        """Average in the weights after an applied update."""
        kept = min(self._decay, (self._updates + 1) / (self._updates + 10)) if self._updates else 0.0
        for average, weights in zip(self._groups, groups, strict=True):
            average.lerp_(weights, 1 - kept)
        self._updates += 1

    def file(self, name: str) -> StateFile:
        """Return the average's file as zero_shards reads it: flat groups, shaped as the rank's master weights."""
        state = {"format": FORMAT, "decay": self._decay, "updates": self._updates, "flat_groups": self._groups}
        return StateFile(name=name, state=state, write=_write)

    def load(self, path: Path) -> None:
        """Continue from a saved average. Raises CheckpointError if it is missing or belongs to other weights."""
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: ema.decay {self._decay} needs the moving average of the run")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        shapes = [tuple(group.shape) for group in saved["flat_groups"]]
        if saved["format"] != FORMAT or shapes != [tuple(group.shape) for group in self._groups]:
            raise CheckpointError(
                f"{path}: format {saved['format']} with groups of {shapes} does not fit this run's weights"
            )
        for average, group in zip(self._groups, saved["flat_groups"], strict=True):
            average.copy_(group)
        self._updates = int(saved["updates"])


def _write(state: dict[str, Any], path: Path) -> None:
    torch.save(state | {"flat_groups": [group.cpu() for group in state["flat_groups"]]}, path)
