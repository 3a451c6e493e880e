"""Make a cache of reference errors on all ranks, or extend one for a longer run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_dpo.data.stream.loader import PairReader
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.errors import DataError
from ds_dpo.making.folder import work_of
from ds_dpo.making.make import Finished, Units, share_of
from ds_dpo.making.progress import Progress
from ds_dpo.making.record import software_versions, write_record_file, write_rows
from ds_dpo.making.tasks import run_tasks
from ds_dpo.process.say import Say
from ds_dpo.reference.cache.places import Places, batches_of, places_of
from ds_dpo.reference.cache.record import (
    BAD,
    ERRORS_ROW,
    NOT_COMPUTED,
    RECORD_NAME,
    Coverage,
    ReferenceRecord,
    read_reference_record,
)

# a row of a unit's file: the errors of a pair visit, or BAD, in the order of the unit's batches
COMPUTED_ROW = np.dtype([("index", "<i8"), ("visit", "<i8"), ("chosen", "<f4"), ("rejected", "<f4")])
# samples of the loader -> the reference's errors on chosen and rejected images, (B,) each
Compute = Callable[[Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Read:
    """A batch as a worker read it. good, bad: (index, visit) of each pair. samples: of the good ones, None if none."""

    samples: Any
    good: list[tuple[int, int]]
    bad: list[tuple[int, int]]
    num_places: int


@dataclass(frozen=True, kw_only=True)
class ReferenceErrorsMaking:
    """How reference errors are made, for `make`: places computed in units.

    coverage: which pair visits to compute. shard_pairs: places in a unit, which is computed as a whole. batch_pairs:
    places in a forward pass. fingerprint: what training will compare. source_description: of the dataset. workers:
    processes that read pairs. load: returns the function that computes; called on every rank if anything is missing.
    say: prints on rank 0.
    """

    out: Path
    coverage: Coverage
    seed: int
    pairs: PairReader[Any]
    shard_pairs: int
    batch_pairs: int
    fingerprint: Mapping[str, str]
    source_description: str
    device_name: str
    workers: int
    load: Callable[[], Compute]
    place: RankEnvironment
    say: Say
    kind = "cache"
    verb = "computed"
    things = "pair visits"
    subfolders = ()

    @property
    def bucket_sizes(self) -> list[int]:
        return list(self.pairs.bucket_sizes)

    @cached_property
    def places(self) -> Places:
        return places_of(self.coverage, bucket_sizes=tuple(self.bucket_sizes), seed=self.seed)

    @property
    def units(self) -> Units:
        return Units(len(self.places), self.shard_pairs)

    def unit_file(self, unit: int) -> Path:
        """Return the path of a unit. It names the unit's end, because the last unit of a shorter run holds less."""
        return work_of(self.out) / f"errors_{unit:06d}_to_{self.units.span(unit).stop}.npy"

    def plan(self) -> dict[str, Any]:
        """Return everything that determines a unit's content, to the bit; the number of units may change."""
        return _plan_of(self)

    def finished(self) -> Finished[ReferenceRecord] | None:
        """Return the finished cache in the folder, if any; this making may extend it."""
        base = self._base()
        if base is None:
            return None
        is_enough = _includes(base.coverage, self.coverage)
        return Finished(record=base, plan=_plan_of(base), is_enough=is_enough)

    def missing(self) -> list[int]:
        """Return the units that are not computed, without those that a finished cache holds completely."""
        return self.units.missing(lambda unit: [self.unit_file(unit)], first=_first_unit_behind(self._base()))

    def make_units(self, missing: Sequence[int]) -> None:
        """Compute this rank's share of the missing units."""
        own = share_of(self.place, missing)
        errors_of = self.load() if missing else None  # all ranks load together
        batches = [list(self._batches(unit)) for unit in own]
        total = sum(len(batch) for of_unit in batches for batch in of_unit)
        progress = Progress(self.verb, self.things, total=total, say=self.say)
        reads = run_tasks(self._read, list(chain.from_iterable(batches)), workers=self.workers)
        for unit, of_unit in zip(own, batches, strict=True):
            assert errors_of is not None
            rows = [self._rows(next(reads), errors_of, progress) for _ in of_unit]
            write_rows(self.unit_file(unit), np.concatenate(rows))
        progress.say_sum()

    def finish(self) -> ReferenceRecord:
        """Write the table, then reference.json, and remove the table that it replaces."""
        base = self._base()
        units = [np.load(self.unit_file(unit)) for unit in range(_first_unit_behind(base), len(self.units))]
        table, num_bad = _table(units, num_pairs=sum(self.bucket_sizes), base=base, out=self.out)
        name = f"errors_{len(self.places)}.npy"
        entry = write_rows(self.out / name, table.reshape(-1))
        record = ReferenceRecord(
            fingerprint=dict(self.fingerprint),
            source_description=self.source_description,
            software={**software_versions(), "device": self.device_name},
            num_pairs=table.shape[1],
            bucket_sizes=self.bucket_sizes,
            num_visits=table.shape[0],
            coverage=self.coverage,
            num_computed=int((table["chosen"] >= 0).sum()),
            num_bad=num_bad,
            shard_pairs=self.shard_pairs,
            batch_pairs=self.batch_pairs,
            table=name,
            files={name: entry},
        )
        write_record_file(self.out / RECORD_NAME, record)
        if base is not None:
            (self.out / base.table).unlink(missing_ok=True)
        return record

    def _base(self) -> ReferenceRecord | None:
        """Return the record of the finished cache in the folder that this making extends; None if there is none."""
        return read_reference_record(self.out) if (self.out / RECORD_NAME).is_file() else None

    def _batches(self, unit: int) -> Iterator[range]:
        return batches_of(self.places, self.units.span(unit), batch_pairs=self.batch_pairs)

    def _read(self, batch: range) -> _Read:
        reads = [self.places.read(self.pairs, place) for place in batch]
        good = [read for read in reads if read.sample is not None]
        return _Read(
            samples=self.pairs.join([read.sample for read in good]) if good else None,
            good=[(read.index, read.visit) for read in good],
            bad=[(index, read.visit) for read in reads for index, _ in read.bad],
            num_places=len(batch),
        )

    def _rows(self, read: _Read, errors_of: Compute, progress: Progress) -> NDArray[np.void]:
        rows = np.empty(len(read.good) + len(read.bad), COMPUTED_ROW)
        places = [*read.good, *read.bad]
        rows["index"], rows["visit"] = [index for index, _ in places], [visit for _, visit in places]
        rows["chosen"] = rows["rejected"] = BAD
        if read.samples is not None:
            chosen, rejected = errors_of(read.samples)
            _require_finite(chosen, rejected, read.samples.pair_ids)
            rows["chosen"][: len(read.good)], rows["rejected"][: len(read.good)] = chosen.cpu(), rejected.cpu()
        progress.add(read.num_places)
        return rows


def _plan_of(made: ReferenceErrorsMaking | ReferenceRecord) -> dict[str, Any]:
    coverage = made.coverage
    if not coverage.num_positions:
        order = "whole visits"
    elif len(made.bucket_sizes) > 1:
        order = f"steps of {coverage.pairs_per_step}"  # which bucket a position is of follows from its step
    else:
        order = "positions"
    return {
        "fingerprint": dict(made.fingerprint),
        "order": order,
        "shard_pairs": made.shard_pairs,
        "batch_pairs": made.batch_pairs,
    }


def _includes(found: Coverage, wanted: Coverage) -> bool:
    """Whether a coverage includes another one of the same order."""
    return found.num_positions >= wanted.num_positions and found.whole_visits >= wanted.whole_visits


def _first_unit_behind(base: ReferenceRecord | None) -> int:
    """Return the first unit that a finished cache does not hold completely.

    If its last unit is not full, that one is computed again with more places: its batches may then be larger, which
    changes the last bits.
    """
    if base is None:
        return 0
    coverage = base.coverage
    return (coverage.num_positions or coverage.whole_visits * base.num_pairs) // base.shard_pairs


def _table(
    units: Sequence[NDArray[np.void]], *, num_pairs: int, base: ReferenceRecord | None, out: Path
) -> tuple[NDArray[np.void], int]:
    """Return ERRORS_ROWs of shape (visits, pairs), and how many of them are BAD."""
    num_visits = max([int(rows["visit"].max()) + 1 for rows in units] + ([0] if base is None else [base.num_visits]))
    table = np.full((num_visits, num_pairs), np.array((NOT_COMPUTED, NOT_COMPUTED), ERRORS_ROW))
    if base is not None:
        table[: base.num_visits] = np.load(out / base.table).reshape(base.num_visits, num_pairs)
    for rows in units:  # in the order of places: a pair that also replaced a bad one keeps its later errors
        for column in ("chosen", "rejected"):
            table[column][rows["visit"], rows["index"]] = rows[column]
    return table, int((table["chosen"] == BAD).sum())


def _require_finite(chosen: Tensor, rejected: Tensor, pair_ids: Tensor) -> None:
    is_finite = (chosen.isfinite() & rejected.isfinite()).cpu()
    if not torch.all(is_finite):
        bad = ", ".join(map(str, pair_ids[~is_finite].tolist()))
        raise DataError(f"the reference's errors of pairs {bad} are NaN or infinite; try another precision")
