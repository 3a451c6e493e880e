"""The sources of an export's tensors: a checkpoint, or a part, an average or a merger of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.layout import Placement
from ds_dpo.zero_shards.reader import ZeroCheckpoint


class Weights(Protocol):
    """Tensors by name, each read on request. folder: their source, for messages."""

    @property
    def folder(self) -> Path: ...

    @property
    def parameters(self) -> Mapping[str, Placement]: ...

    def read(self, name: str, *, dtype: torch.dtype = torch.float32) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Derived:
    """Weights that are computed from others while they are read."""

    folder: Path
    parameters: Mapping[str, Placement]
    reader: Callable[[str, torch.dtype], Tensor]

    def read(self, name: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return one tensor in dtype."""
        return self.reader(name, dtype)


def select_keys(weights: Weights, prefix: str) -> Weights:
    """Return the weights under a prefix such as "unet", with their names without it.

    Raises CheckpointError with the prefixes that exist if there are none.
    """
    start = prefix.rstrip(".") + "."
    inside = {name.removeprefix(start): place for name, place in weights.parameters.items() if name.startswith(start)}
    if not inside:
        heads = sorted({name.partition(".")[0] for name in weights.parameters})
        raise CheckpointError(
            f"{weights.folder}: has no parameter under {start!r}; its names begin with {', '.join(heads)}"
        )
    return Derived(weights.folder, inside, lambda name, dtype: weights.read(start + name, dtype=dtype))


def averaged(checkpoint: ZeroCheckpoint) -> Weights:
    """Return the moving average of each trained weight; frozen weights are unchanged.

    Raises CheckpointError if the checkpoint has no averages.
    """
    if not checkpoint.has_ema:
        raise CheckpointError(f"{checkpoint.folder}: has no EMA weights; leave --ema out to export the trained weights")

    return Derived(
        checkpoint.folder, checkpoint.parameters, lambda name, dtype: checkpoint.read(name, "ema", dtype=dtype)
    )
