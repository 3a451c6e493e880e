"""Make a folder on all ranks, unit by unit; a rerun continues where the last one was killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import on_main, raised_everywhere
from ds_dpo.making.folder import begin, locked, require_same_plan, work_of
from ds_dpo.process.say import Say

Record = TypeVar("Record")


@dataclass(frozen=True)
class Units:
    """`total` things, made `size` at a time: unit N begins at thing N * size, and the last unit may be smaller."""

    total: int
    size: int

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def span(self, unit: int) -> range:
        """Return the numbers of the things in a unit."""
        return range(unit * self.size, min((unit + 1) * self.size, self.total))

    def missing(self, files_of: Callable[[int], Sequence[Path]], *, first: int = 0) -> list[int]:
        """Return the units, from `first` on, of which at least one file does not exist."""
        return [unit for unit in range(first, len(self)) if not all(path.exists() for path in files_of(unit))]


def share_of(place: RankEnvironment, units: Sequence[int]) -> Sequence[int]:
    """Return one rank's share of the units: consecutive ones of a list that is the same on every rank."""
    rank, world_size = place.rank, place.world_size
    return units[len(units) * rank // world_size : len(units) * (rank + 1) // world_size]


@dataclass(frozen=True, kw_only=True)
class Finished(Generic[Record]):
    """What a folder holds that was finished earlier.

    plan: the plan by which it was made. is_enough: False if the folder must be extended, because units are missing.
    """

    record: Record
    plan: Mapping[str, Any]
    is_enough: bool = True


class Making(Protocol[Record]):
    """One kind of folder. Every rank calls `make_units`; only rank 0 calls the other methods.

    say: prints on rank 0. kind: what the folder is, such as "cache". verb: for the log, what is done to a unit, such as
    "encoded". things: what a unit consists of, such as "pairs". subfolders: names of the folders inside `out` to which
    units are written.
    """

    @property
    def out(self) -> Path: ...
    @property
    def say(self) -> Say: ...
    @property
    def kind(self) -> str: ...
    @property
    def verb(self) -> str: ...
    @property
    def things(self) -> str: ...
    @property
    def subfolders(self) -> Sequence[str]: ...
    @property
    def units(self) -> Units: ...

    def plan(self) -> Mapping[str, Any]:
        """Return everything that determines the content of a unit."""

    def finished(self) -> Finished[Record] | None:
        """Return what an earlier making finished in `out`; None if it holds no record."""

    def missing(self) -> list[int]:
        """Return the units that do not exist yet."""

    def make_units(self, missing: Sequence[int]) -> None:
        """Make this rank's share of the missing units."""

    def finish(self) -> Record:
        """Join the units, and write the record as the last file."""


def make(making: Making[Record]) -> Record:
    """Make what is missing of a folder, and return its record; every rank calls it.

    Raises DsDpoError on all ranks if the folder cannot be begun or finished. A rank that fails in `make_units` raises
    alone, and its launcher ends the other ranks: the units made so far stay.
    """
    with ExitStack() as held:
        with raised_everywhere():
            if is_main():
                held.enter_context(locked(making.out))
        record, missing = on_main(lambda: _begin(making))
        if record is None:
            making.make_units(missing)
            record = on_main(lambda: _finish(making))
    return record


def _begin(making: Making[Record]) -> tuple[Record | None, list[int]]:
    """Prepare the folder; returns the missing units, and the folder's record if nothing is left to make."""
    out, plan, finished, units = making.out, making.plan(), making.finished(), making.units
    if finished is not None:
        require_same_plan(out, finished.plan, plan, kind=making.kind)
        if finished.is_enough:
            shutil.rmtree(work_of(out), ignore_errors=True)  # still there if a kill came just before its removal
            making.say(f"{out} is finished already; nothing is {making.verb}")
            return finished.record, []
    state = begin(out, plan, kind=making.kind, subfolders=making.subfolders, is_extension=finished is not None)
    missing = making.missing()
    making.say(
        f"{state} {out}: {units.total} {making.things} in {len(units)} units of up to {units.size}; "
        f"{len(units) - len(missing)} are {making.verb}"
    )
    return None, missing


def _finish(making: Making[Record]) -> Record:
    record = making.finish()
    shutil.rmtree(work_of(making.out))
    return record
