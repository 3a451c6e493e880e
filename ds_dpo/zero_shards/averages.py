"""Moving averages of the weights, which this project saves beside the shards, rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.files import check_number_of_ranks, check_saved_name
from ds_dpo.zero_shards.tables import ShardRow
from ds_dpo.zero_shards.unpickle import load_shard

FORMAT = 1


def open_averages(files: Sequence[Path], masters: Sequence[Sequence[Tensor]]) -> list[ShardRow]:
    """Open one file for each rank; they have the layout of that rank's flat master weights.

    masters: [rank][group]. Raises CheckpointError naming the file that is missing, too many, or of another layout.
    """
    check_number_of_ranks(files, expected=len(masters))
    return [_open(path, groups) for path, groups in zip(files, masters, strict=True)]


def _open(path: Path, masters: Sequence[Tensor]) -> ShardRow:
    shard = load_shard(path)
    check_saved_name(path, shard.archive.stem)
    groups = shard.content.get("flat_groups")
    if shard.content.get("format") != FORMAT or not isinstance(groups, list):
        raise CheckpointError(f"{path}: not the moving averages that this version saves, format {FORMAT}")
    found, expected = [tuple(group.shape) for group in groups], [tuple(master.shape) for master in masters]
    if found != expected:
        raise CheckpointError(f"{path}: holds averages of shapes {found}, the rank's weights are {expected}")
    return ShardRow(shard.archive, groups)
