"""What an export takes its tensors from: a checkpoint, or a part, an average or a merger of what it holds."""

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
    """Tensors by name, each read when it is asked for; folder is where they come from, for messages."""

    @property
    def folder(self) -> Path: ...

    @property
    def parameters(self) -> Mapping[str, Placement]: ...

    def read(self, name: str, *, dtype: torch.dtype = torch.float32) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Derived:
    """Weights that are made of others while they are read."""

    folder: Path
    parameters: Mapping[str, Placement]
    reader: Callable[[str, torch.dtype], Tensor]

    def read(self, name: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make one tensor, in dtype."""
        return self.reader(name, dtype)


def select_keys(weights: Weights, prefix: str) -> Weights:
    """The weights under a prefix such as "unet", under their names without it.

    Raises CheckpointError where there are none, naming what there is instead.
    """
    start = prefix.rstrip(".") + "."
    inside = {name.removeprefix(start): place for name, place in weights.parameters.items() if name.startswith(start)}
    if not inside:
        heads = sorted({name.partition(".")[0] for name in weights.parameters})
        raise CheckpointError(f"{weights.folder}: no parameter under {start!r}; names begin with {', '.join(heads)}")
    return Derived(weights.folder, inside, lambda name, dtype: weights.read(start + name, dtype=dtype))


def averaged(checkpoint: ZeroCheckpoint) -> Weights:
    """The moving average of each trained weight; frozen ones are as they are.

    Raises CheckpointError where the checkpoint has none.
    """
    if not checkpoint.has_ema:
        raise CheckpointError(f"{checkpoint.folder}: no EMA weights in it; leave --ema out to export the trained ones")

    return Derived(
        checkpoint.folder, checkpoint.parameters, lambda name, dtype: checkpoint.read(name, "ema", dtype=dtype)
    )
