"""Read single parameters, and their AdamW moments, from the shards of any ZeRO stage; memory holds one at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.files import find_files
from ds_dpo.zero_shards.layout import Placement
from ds_dpo.zero_shards.stages import Shards, open_stage
from ds_dpo.zero_shards.unpickle import load_shard

Quantity = Literal["fp32", "exp_avg", "exp_avg_sq"]


@dataclasses.dataclass(frozen=True)
class ZeroCheckpoint:
    """An opened checkpoint: what it holds, and read() to have one tensor of it.

    global_steps: updates done. parameters: name -> placement, in DeepSpeed's order, frozen ones last.
    """

    folder: Path
    stage: int
    world_size: int
    global_steps: int
    parameters: dict[str, Placement]
    _shards: Shards

    def read(self, name: str, quantity: Quantity = "fp32", *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Copy one full tensor out of the shards; fp32 is the master weight, or a frozen weight as it was saved.

        Returns the parameter's shape in dtype, rounded to nearest from fp32.
        Raises CheckpointError for an unknown name, and for a quantity that the checkpoint has not.
        """
        if name not in self.parameters:
            raise CheckpointError(f"{self.folder}: no parameter {name!r} among {len(self.parameters)}")
        placement = self.parameters[name]
        is_saved_weight = placement.is_frozen and quantity == "fp32"
        table = self._shards.tables.get("frozen" if is_saved_weight else quantity)
        if table is None or (placement.is_frozen and not is_saved_weight):
            why = (
                "the parameter is frozen"
                if placement.is_frozen
                else f"ZeRO {self.stage} before any update, or not saved"
            )
            raise CheckpointError(f"{self.folder}: no {quantity} of {name!r} ({why})")
        tensor = torch.empty(placement.numel, dtype=dtype)
        filled = 0
        for span in placement.spans:
            source = table[span.rank][span.group].reshape(-1)[span.start : span.stop]
            tensor[filled : filled + span.stop - span.start].copy_(source)
            filled += span.stop - span.start
        return tensor.view(placement.shape)


def open_checkpoint(folder: Path) -> ZeroCheckpoint:
    """Open a DeepSpeed tag folder: file headers are read and compared, tensors are not.

    Raises CheckpointError naming the file for one that is missing, torn, foreign, of another run, or unsafe.
    """
    files = find_files(folder)
    model = [load_shard(path) for path in files.model]
    shards = open_stage(files, model, [load_shard(path) for path in files.optimizer])
    return ZeroCheckpoint(
        folder=folder,
        stage=shards.stage,
        world_size=max(len(files.optimizer), int(model[0].get("dp_world_size", 1))),
        global_steps=int(model[0].get("global_steps", 0)),
        parameters=shards.placements,
        _shards=shards,
    )
