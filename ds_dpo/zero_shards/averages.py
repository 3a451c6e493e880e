"""Moving averages of the weights, which this project saves beside the shards, a file per rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.files import check_number_of_ranks, check_saved_name
from ds_dpo.zero_shards.tables import ShardRow
from ds_dpo.zero_shards.unpickle import load_shard

FORMAT = 1


def open_averages(files: Sequence[Path], masters: Sequence[Sequence[Tensor]]) -> tuple[list[ShardRow], int]:
    """Open one file per rank; each has the layout of that rank's flat master weights.

    masters: [rank][group]. Returns the rows, and the number of updates in the averages.
    Raises CheckpointError for a file that is missing, left over, of another layout, or of another update.
    """
    check_number_of_ranks(files, expected=len(masters))
    opened = [_open(path, groups) for path, groups in zip(files, masters, strict=True)]
    counts = [updates for _, updates in opened]
    for path, updates in zip(files, counts, strict=True):
        if updates != counts[0]:
            raise CheckpointError(
                f"{path}: holds averages of {updates} updates, but other ranks' files hold {counts[0]}"
            )
    return [row for row, _ in opened], counts[0]


def _open(path: Path, masters: Sequence[Tensor]) -> tuple[ShardRow, int]:
    shard = load_shard(path)
    check_saved_name(path, shard.archive.stem)
    groups = shard.content.get("flat_groups")
    if shard.content.get("format") != FORMAT or not isinstance(groups, list):
        raise CheckpointError(f"{path}: not moving averages in the format of this version, {FORMAT}")
    found, expected = [tuple(group.shape) for group in groups], [tuple(master.shape) for master in masters]
    if found != expected:
        raise CheckpointError(f"{path}: holds averages of shapes {found}, but the rank's weights have {expected}")
    return ShardRow(shard.archive, groups), int(shard.content.get("updates", 0))
