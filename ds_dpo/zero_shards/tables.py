"""Flat tensors by rank and group with their files: the tables that placements point into."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.archive import Archive
from ds_dpo.zero_shards.layout import Placement
from ds_dpo.zero_shards.unpickle import Shard, load_file

MOMENTS = ("exp_avg", "exp_avg_sq")
WORTH_A_THREAD_BYTES = 16 * 2**20


class Row(Protocol):
    """One rank's tensors of one quantity, by group."""

    def tensor(self, group: int) -> tuple[Tensor, Archive]:
        """Return the tensor of a group, still in its file, and that file."""
        ...


Table = Sequence[Row]


@dataclasses.dataclass(frozen=True)
class ShardRow:
    """Tensors in one file."""

    archive: Archive
    tensors: Sequence[Tensor]

    def tensor(self, group: int) -> tuple[Tensor, Archive]:
        """Return the tensor of a group, and the file."""
        return self.tensors[group], self.archive


@dataclasses.dataclass(frozen=True)
class FileRow:
    """Tensors of a universal checkpoint; each has its own file, which is opened when it is read."""

    paths: Sequence[Path]
    numels: Sequence[int]

    def tensor(self, group: int) -> tuple[Tensor, Archive]:
        """Return the tensor of a group, and its file. Raises CheckpointError for a wrong number of elements."""
        content, archive = load_file(self.paths[group])
        # DeepSpeed wraps the tensor for stages 1 and 2, not for 3
        tensor = content.get("param") if isinstance(content, dict) else content
        found = tensor.numel() if isinstance(tensor, Tensor) else type(tensor).__name__
        if not isinstance(tensor, Tensor) or found != self.numels[group]:
            raise CheckpointError(f"{self.paths[group]}: holds {found} elements, not {self.numels[group]}")
        return tensor, archive


def shard_rows(shards: Sequence[Shard], tensors: Sequence[Sequence[Tensor]]) -> Table:
    """Return a table of the tensors in each file. tensors: [rank][group]."""
    return [ShardRow(shard.archive, own) for shard, own in zip(shards, tensors, strict=True)]


@dataclasses.dataclass(frozen=True)
class OptimizerStates:
    """What an optimizer keeps besides the weights, in a form that suits every optimizer.

    elementwise: names of states with one fp32 value per element of the weights. scalars: numbers by name, the same in
    all groups. others: name -> description of any other state, such as bytes in blocks, which fits no other layout.
    """

    elementwise: tuple[str, ...] = ()
    scalars: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Placements of all parameters, and the tables that they point into: fp32, frozen, averages, and the optimizer's.

    optimizer: what the optimizer keeps; its elementwise states are tables of the same names.
    average_updates: number of updates in each kind of moving averages.
    """

    stage: int
    placements: dict[str, Placement]
    tables: dict[str, Table]
    optimizer: OptimizerStates = dataclasses.field(default_factory=OptimizerStates)
    average_updates: Mapping[str, int] = dataclasses.field(default_factory=dict)


class VerificationBeside:
    """Compares tensors with their checksums on another thread; leaving it waits, and raises what was found."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._begun: list[concurrent.futures.Future[None]] = []

    def begin(self, found: Iterable[tuple[Tensor, Archive]]) -> None:
        """Queue tensors to be verified; each is verified once."""
        for tensor, archive in found:
            self._begun.append(self._thread.submit(archive.verify_tensor, tensor))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for verification in self._begun:
                verification.result()  # raises CheckpointError
        finally:
            self._thread.shutdown(cancel_futures=True)


def verify_tensors(found: Iterable[tuple[Tensor, Archive]]) -> None:
    """Compare tensors with the checksums in their files, each once.

    Raises CheckpointError naming the file that has changed.
    """
    unverified = [(tensor, archive) for tensor, archive in found if not archive.is_verified(tensor)]
    if sum(tensor.nbytes for tensor, _ in unverified) < WORTH_A_THREAD_BYTES:
        for tensor, archive in unverified:
            archive.verify_tensor(tensor)
        return
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda pair: pair[1].verify_tensor(pair[0]), unverified))
