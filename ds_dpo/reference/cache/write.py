"""Make a cache of reference errors on all ranks; a rerun goes on where the last was killed, a longer one extends."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_dpo.data.stream.loader import PairReader
from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import on_main
from ds_dpo.encoding.cache.finish import SOFTWARE
from ds_dpo.encoding.cache.plan import begin, locked, require_same_plan
from ds_dpo.encoding.cache.progress import Progress
from ds_dpo.encoding.cache.record import StoredFile, replace_file
from ds_dpo.encoding.cache.tasks import run_tasks
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say
from ds_dpo.reference.cache.places import Places, batches_of
from ds_dpo.reference.cache.record import (
    BAD,
    ERRORS_ROW,
    NOT_COMPUTED,
    RECORD_NAME,
    Coverage,
    ReferenceRecord,
    read_reference_record,
    write_reference_record,
)
from ds_dpo.storage.manifest import hash_file

# of a unit: what was computed, or found BAD, in the order of its places
COMPUTED_ROW = np.dtype([("index", "<i8"), ("visit", "<i8"), ("chosen", "<f4"), ("rejected", "<f4")])
# samples of the loader -> the reference's errors of chosen and rejected images, (B,) each
Compute = Callable[[Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """What is to be made. shard_pairs: places of a unit, computed as a whole. batch_pairs: of a forward pass.

    fingerprint: what training will compare. source_description: of the dataset. workers: processes that read.
    """

    out: Path
    coverage: Coverage
    bucket_sizes: list[int]
    shard_pairs: int
    batch_pairs: int
    fingerprint: Mapping[str, str]
    source_description: str
    device_name: str
    workers: int

    def plan(self) -> dict[str, Any]:
        """Return everything that a unit's content follows from, to the bit; how many units there are may change."""
        return _plan(
            fingerprint=self.fingerprint,
            coverage=self.coverage,
            bucket_sizes=self.bucket_sizes,
            shard_pairs=self.shard_pairs,
            batch_pairs=self.batch_pairs,
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceLayout:
    """Where the files lie. A unit's file names its last place, as that of a shorter run holds less."""

    out: Path

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def plan(self) -> Path:
        return self.work / "plan.json"

    def unit(self, unit: int, stop: int) -> Path:
        return self.work / f"errors_{unit:06d}_to_{stop}.npy"

    def make_folders(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)

    def remove_unfinished_files(self) -> None:
        for path in self.out.rglob(".*.partial"):
            path.unlink(missing_ok=True)


def write_reference_cache(
    request: ReferenceRequest,
    places: Places,
    pairs: PairReader[Any],
    compute: Callable[[], Compute],
    *,
    place: RankEnvironment,
    say: Say,
) -> ReferenceRecord:
    """Compute what is missing of the cache that was asked for; every rank of `place` calls it with the same request.

    compute: gives the function that computes, and is called where something is missing. say: prints, on rank 0. Raises
    DsDpoError on all ranks where the cache cannot be begun or finished. A rank that fails as it computes raises alone
    and its launcher ends the others: the units that were computed stay.
    """
    with ExitStack() as held:
        on_main(lambda: _enter(held, request))
        making = _Making(request=request, places=places, pairs=pairs, place=place, say=say)
        finished = on_main(making.begin)
        if finished is not None:
            return finished
        making.compute(compute)
        record = on_main(making.finish)
    return record


def _enter(held: ExitStack, request: ReferenceRequest) -> None:
    held.enter_context(locked(request.out))


@dataclass(frozen=True)
class _Read:
    """What a process read of a batch. index, visit: of each sample, then of each bad pair. samples: None if all bad."""

    samples: Any
    good: list[tuple[int, int]]
    bad: list[tuple[int, int]]
    num_places: int


@dataclass(frozen=True, kw_only=True)
class _Making:
    request: ReferenceRequest
    places: Places
    pairs: PairReader[Any]
    place: RankEnvironment
    say: Say

    @property
    def layout(self) -> ReferenceLayout:
        return ReferenceLayout(out=self.request.out)

    @property
    def num_units(self) -> int:
        return -(-len(self.places) // self.request.shard_pairs)

    def unit_file(self, unit: int) -> Path:
        return self.layout.unit(unit, min((unit + 1) * self.request.shard_pairs, len(self.places)))

    def begin(self) -> ReferenceRecord | None:
        """Prepare the folder, or return the record of what is there already and enough."""
        plan, out = self.request.plan(), self.request.out
        base = self._base()
        if base is not None:
            require_same_plan(self.layout, _plan_of_record(base), plan)
            if _includes(base.coverage, self.request.coverage):
                shutil.rmtree(self.layout.work, ignore_errors=True)  # a kill just before its removal leaves it
                self.say(f"{out} is finished already; nothing is computed")
                return base
            self.layout.make_folders()
            self.layout.remove_unfinished_files()
            verb = "extending"
        else:
            verb = "going on with" if begin(self.layout, plan) else "making"
        missing = self._missing()
        self.say(
            f"{verb} {out}: {len(self.places)} (pair, visit) in {self.num_units} units of up to "
            f"{self.request.shard_pairs}; {self.num_units - len(missing)} are computed"
        )
        return None

    def compute(self, compute: Callable[[], Compute]) -> None:
        """Compute what is missing, each rank its part."""
        missing = on_main(self._missing)
        rank, world_size = self.place.rank, self.place.world_size
        own = missing[len(missing) * rank // world_size : len(missing) * (rank + 1) // world_size]
        errors_of = compute() if missing else None  # all ranks load together
        batches = [list(self._batches(unit)) for unit in own]
        total = sum(len(batch) for of_unit in batches for batch in of_unit)
        progress = Progress("computed", "pairs", total=total, say=self.say)
        reads = run_tasks(self._read, list(chain.from_iterable(batches)), workers=self.request.workers)
        for unit, of_unit in zip(own, batches, strict=True):
            assert errors_of is not None
            rows = [self._rows(next(reads), errors_of, progress) for _ in of_unit]
            _write_rows(self.unit_file(unit), np.concatenate(rows))
        counts = np.array(gather_objects(progress.done), np.int64)
        self.say(f"computed {counts.sum()} (pair, visit) in this run, on {len(counts)} ranks")

    def finish(self) -> ReferenceRecord:
        """Write the table, then reference.json, then remove what is no longer needed."""
        base, request = self._base(), self.request
        first = 0 if base is None else _first_unit_behind(base)
        units = [np.load(self.unit_file(unit)) for unit in range(first, self.num_units)]
        table, num_bad = _table(units, num_pairs=sum(request.bucket_sizes), base=base, out=request.out)
        name = f"errors_{len(self.places)}.npy"
        content = io.BytesIO()
        np.lib.format.write_array(content, table.reshape(-1), version=(1, 0), allow_pickle=False)
        replace_file(request.out / name, content.getvalue())
        record = ReferenceRecord(
            fingerprint=dict(request.fingerprint),
            source_description=request.source_description,
            software={**{name: version(name) for name in SOFTWARE}, "device": request.device_name},
            num_pairs=table.shape[1],
            bucket_sizes=request.bucket_sizes,
            num_visits=table.shape[0],
            coverage=request.coverage,
            num_computed=int((table["chosen"] >= 0).sum()),
            num_bad=num_bad,
            shard_pairs=request.shard_pairs,
            batch_pairs=request.batch_pairs,
            table=name,
            files={name: StoredFile.of(hash_file(request.out / name))},
        )
        write_reference_record(request.out, record)
        if base is not None:
            (request.out / base.table).unlink(missing_ok=True)
        shutil.rmtree(self.layout.work)
        return record

    def _base(self) -> ReferenceRecord | None:
        """Return the record of a finished cache in the folder, of which this one is to be an extension."""
        return read_reference_record(self.request.out) if (self.request.out / RECORD_NAME).is_file() else None

    def _missing(self) -> list[int]:
        base = self._base()
        first = 0 if base is None else _first_unit_behind(base)
        return [unit for unit in range(first, self.num_units) if not self.unit_file(unit).exists()]

    def _batches(self, unit: int) -> Iterator[range]:
        request = self.request
        return batches_of(self.places, unit, shard_pairs=request.shard_pairs, batch_pairs=request.batch_pairs)

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


def _plan(
    *,
    fingerprint: Mapping[str, str],
    coverage: Coverage,
    bucket_sizes: Sequence[int],
    shard_pairs: int,
    batch_pairs: int,
) -> dict[str, Any]:
    if not coverage.num_positions:
        order = "whole visits"
    elif len(bucket_sizes) > 1:
        order = f"steps of {coverage.pairs_per_step}"  # which bucket a position is of follows from its step
    else:
        order = "positions"
    return {
        "fingerprint": dict(fingerprint),
        "order": order,
        "shard_pairs": shard_pairs,
        "batch_pairs": batch_pairs,
    }


def _plan_of_record(record: ReferenceRecord) -> dict[str, Any]:
    return _plan(
        fingerprint=record.fingerprint,
        coverage=record.coverage,
        bucket_sizes=record.bucket_sizes,
        shard_pairs=record.shard_pairs,
        batch_pairs=record.batch_pairs,
    )


def _includes(found: Coverage, wanted: Coverage) -> bool:
    """Return whether a coverage of the same order has all of another one."""
    return found.num_positions >= wanted.num_positions and found.whole_visits >= wanted.whole_visits


def _first_unit_behind(base: ReferenceRecord) -> int:
    """Return the first unit that a finished cache does not hold whole: its last one is computed again with more in it.

    Its batches may then be longer, and so their bits others.
    """
    coverage = base.coverage
    return (coverage.num_positions or coverage.whole_visits * base.num_pairs) // base.shard_pairs


def _table(
    units: Sequence[NDArray[np.void]], *, num_pairs: int, base: ReferenceRecord | None, out: Path
) -> tuple[NDArray[np.void], int]:
    """Return ERRORS_ROWs, (visits, pairs), and how many of them are BAD."""
    num_visits = max([int(rows["visit"].max()) + 1 for rows in units] + ([0] if base is None else [base.num_visits]))
    table = np.full((num_visits, num_pairs), np.array((NOT_COMPUTED, NOT_COMPUTED), ERRORS_ROW))
    if base is not None:
        table[: base.num_visits] = np.load(out / base.table).reshape(base.num_visits, num_pairs)
    for rows in units:  # in the order of places: of a pair that was also read as a stand-in the later one stays
        for column in ("chosen", "rejected"):
            table[column][rows["visit"], rows["index"]] = rows[column]
    return table, int((table["chosen"] == BAD).sum())


def _write_rows(path: Path, rows: NDArray[np.void]) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, rows, version=(1, 0), allow_pickle=False)
    replace_file(path, content.getvalue())


def _require_finite(chosen: Tensor, rejected: Tensor, pair_ids: Tensor) -> None:
    is_finite = (chosen.isfinite() & rejected.isfinite()).cpu()
    if not torch.all(is_finite):
        bad = ", ".join(map(str, pair_ids[~is_finite].tolist()))
        raise DataError(f"the reference's errors of pairs {bad} are NaN or infinite; another precision may hold them")
