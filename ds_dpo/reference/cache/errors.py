"""A cache of reference errors, read by the loader: two numbers for each pair visit, found by their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ds_dpo.batch import DrawnPairs
from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.loader import PairReader
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.encoding.cache.reading import OpenFiles, RowFile
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.record import check_sizes, differences, refuse_if_stale
from ds_dpo.process.say import Say
from ds_dpo.reference.cache.record import (
    BAD,
    ERRORS_ROW,
    ReferenceRecord,
    read_reference_record,
)


class ReferenceErrors:
    """A finished cache; only its record is in memory."""

    def __init__(self, folder: Path) -> None:
        """Read the record and the table's header. Raises DataError if something is missing or cut short."""
        self.folder = folder
        self.record: ReferenceRecord = read_reference_record(folder)
        table = folder / self.record.table
        check_sizes(folder, self.record.files)
        self._rows = RowFile(OpenFiles(folder), folder, self.record.table, ERRORS_ROW)
        num_rows = self.record.num_visits * self.record.num_pairs
        if len(self._rows) != num_rows:
            raise DataError(f"{table}: {len(self._rows)} rows, the record says {num_rows}; make the cache again")

    @property
    def description(self) -> str:
        """What the cache holds, for the log."""
        record = self.record
        bad = f"; {record.num_bad} pair visits could not be read" if record.num_bad else ""
        return (
            f"reference cache {self.folder}: errors of {record.num_computed} pair visits ({record.num_pairs} pairs, up "
            f"to {record.num_visits} visits of each){bad}; made from {record.source_description}"
        )

    def require_covers(self, *, max_train_steps: int, pairs_per_step: int, seed: int) -> None:
        """Raise ConfigError if a run needs pair visits that the cache lacks, with their number.

        The time does not grow with pairs or steps, except with the steps of one epoch if there are buckets.
        """
        record, coverage = self.record, self.record.coverage
        order = PairOrder(record.bucket_sizes, pairs_per_step=pairs_per_step, seed=seed)
        buckets = len(record.bucket_sizes)
        if coverage.holds(max_train_steps, pairs_per_step=pairs_per_step, order=order, num_buckets=buckets):
            return
        needed = max_train_steps * pairs_per_step
        missing = self._count_missing(order, num_steps=max_train_steps, pairs_per_step=pairs_per_step)
        steps = self._steps_that_fit(order, pairs_per_step=pairs_per_step, most=max_train_steps)
        shorter = f", or train with max_train_steps {steps}" if steps else ""
        raise ConfigError(
            f"reference.cache {self.folder} lacks {missing} of the {needed} pair visits that {max_train_steps} steps "
            f"of {pairs_per_step} pairs need: run scripts/cache.py --reference again with max_train_steps "
            f"{max_train_steps}, or with --visits {max(order.visits_begun(max_train_steps))}{shorter}"
        )

    def require_fits(self, wanted: Mapping[str, str]) -> None:
        """Raise ConfigError that names each part in which the cache is not what a run needs."""
        changes = differences(in_words(self.record.fingerprint), in_words(wanted), asker="this run")
        why = "its errors are not those of this run's reference"
        refuse_if_stale("reference.cache", self.folder, changes, why=why, program="scripts/cache.py --reference")

    def read(self, index: int, visit: int) -> tuple[float, float]:
        """Return the errors of the chosen and the rejected image.

        Raises BadRowError if the pair was unreadable when the cache was made, and DataError if its errors were not
        computed in this visit.
        """
        if visit < self.record.num_visits:
            row = self._rows[visit * self.record.num_pairs + index]
            chosen, rejected = float(row["chosen"]), float(row["rejected"])
            if chosen == BAD:
                raise BadRowError(f"pair {index}", f"it could not be read when {self.folder} was made")
            if chosen == chosen and rejected == rejected:
                return chosen, rejected
        raise DataError(
            f"{self.folder}: no reference error of pair {index} in visit {visit}; it replaces a pair that is now "
            "unreadable, but was readable when the cache was made: repair that pair, or make the cache again with "
            "--visits"
        )

    def _count_missing(self, order: PairOrder, *, num_steps: int, pairs_per_step: int) -> int:
        coverage, buckets = self.record.coverage, len(self.record.bucket_sizes)
        if buckets == 1:
            return num_steps * pairs_per_step - coverage.num_positions
        first = coverage.num_positions // pairs_per_step if pairs_per_step == coverage.pairs_per_step else 0
        positions = range(first * pairs_per_step, num_steps * pairs_per_step)
        return sum(order.place(position)[1] >= coverage.whole_visits for position in positions)

    def _steps_that_fit(self, order: PairOrder, *, pairs_per_step: int, most: int) -> int:
        """Return the largest number of steps for which the cache is enough."""
        buckets, fits, too_many = len(self.record.bucket_sizes), 0, most
        while too_many - fits > 1:
            steps = (fits + too_many) // 2
            if self.record.coverage.holds(steps, pairs_per_step=pairs_per_step, order=order, num_buckets=buckets):
                fits = steps
            else:
                too_many = steps
        return fits


def open_reference_errors(folder: str | Path, *, say: Say) -> ReferenceErrors:
    """Open a finished cache, and say what it holds. Raises DataError if it is not complete."""
    errors = ReferenceErrors(Path(folder).expanduser())
    say(errors.description)
    return errors


class PairsWithReferenceErrors:
    """Adds the reference's errors to the samples of another loader.PairReader."""

    def __init__(self, pairs: PairReader[Any], errors: ReferenceErrors) -> None:
        """pairs: the reader to wrap. errors: a cache that fits these pairs."""
        self._pairs, self._errors = pairs, errors

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of pairs of each bucket."""
        return self._pairs.bucket_sizes

    def read(self, index: int, visit: int) -> DrawnPairs:
        """Return a pair with the draws of a visit and its errors, B = 1.

        Raises BadRowError if the pair cannot be read, or could not be read when the cache was made: the run then
        replaces it by the same pair as the cache did.
        """
        sample: DrawnPairs = self._pairs.read(index, visit)
        chosen, rejected = self._errors.read(index, visit)
        return replace(
            sample, reference_chosen_error=torch.tensor([chosen]), reference_rejected_error=torch.tensor([rejected])
        )

    def join(self, parts: list[Any]) -> Any:
        """Concatenate samples of one bucket."""
        return self._pairs.join(parts)


def in_words(parts: Mapping[str, str]) -> dict[str, str]:
    """Return the parts of a fingerprint for a message: where images came from, in words that a person understands."""
    encoding = parts.get("encoding")
    if encoding is None:
        return dict(parts)
    if encoding == "as they come":
        return {**parts, "encoding": "images that are encoded when they are read"}
    return {**parts, "encoding": f"images from data.cache ({encoding.replace(' of a cache', '')})"}
