"""An exponential moving average of the fp32 master weights; each rank keeps its own part under any ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.storage.state_files import StateFile

FORMAT = 1


# what each kind of average is configured by; its name is that of its table in zero_shards
Kind = Literal["ema", "reference"]
FIELDS: dict[Kind, str] = {"ema": "ema.decay", "reference": "reference.ema_decay"}


def average_file_name(rank: int, kind: Kind = "ema") -> str:
    """Return the name of a rank's file in a checkpoint folder."""
    return f"{kind}_rank_{rank:05d}.pt"


class MovingAverage:
    """Averages flat groups of weights over applied updates; a skipped update does not change the average.

    The k-th update keeps a share min(decay, k / (k + 9)) of the average, and the first one keeps nothing; the average
    of a reference keeps the decay from the first update on.
    Source: diffusers.training_utils.EMAModel.get_decay with its defaults.
    """

    def __init__(self, groups: Sequence[Tensor], *, decay: float, kind: Kind = "ema") -> None:
        """Start from the weights. groups: 1-D fp32 tensors, as the rank's optimizer holds them."""
        self._groups = [group.detach().clone() for group in groups]
        self._decay, self._kind = decay, kind
        self._updates = 0

    @property
    def groups(self) -> list[Tensor]:
        """The averages, with the shapes of the groups that it started from."""
        return self._groups

    @property
    def kind(self) -> Kind:
        return self._kind

    def continue_after(self, updates: int) -> None:
        """Continue the count after this number of updates, when the averages themselves have been set."""
        self._updates = updates

    @torch.no_grad()
    def update(self, groups: Sequence[Tensor]) -> None:
        """Average in the weights after an applied update."""
        kept = self._share_kept()
        for average, weights in zip(self._groups, groups, strict=True):
            average.lerp_(weights, 1 - kept)
        self._updates += 1

    def _share_kept(self) -> float:
        if self._kind == "reference":
            return self._decay
        return min(self._decay, (self._updates + 1) / (self._updates + 10)) if self._updates else 0.0

    def file(self, rank: int) -> StateFile:
        """Return a rank's file as zero_shards reads it: flat groups, shaped as the rank's master weights."""
        state = {"format": FORMAT, "decay": self._decay, "updates": self._updates, "flat_groups": self._groups}
        return StateFile(name=average_file_name(rank, self._kind), state=state, write=_write)

    def load(self, folder: Path, rank: int) -> None:
        """Continue from a rank's saved average. Raises CheckpointError if it is missing or belongs to other weights."""
        path = folder / average_file_name(rank, self._kind)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: {FIELDS[self._kind]} {self._decay} needs the moving average of the run"
            )
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
