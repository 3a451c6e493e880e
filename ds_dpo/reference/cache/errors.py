"""A cache of reference errors as the loader reads it: two numbers of each (pair, visit), found by their place alone."""

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
    """A finished cache; nothing of it is in memory but its record."""

    def __init__(self, folder: Path) -> None:
        """Read the record and the table's header. Raises DataError where something is missing or cut short."""
        self.folder = folder
        self.record: ReferenceRecord = read_reference_record(folder)
        table = folder / self.record.table
        check_sizes(folder, self.record.files)
        self._rows = RowFile(OpenFiles(folder), folder, self.record.table, ERRORS_ROW)
        if len(self._rows) != self.record.num_visits * self.record.num_pairs:
            raise DataError(f"{table}: {len(self._rows)} rows, the record says otherwise; make the cache anew")

    @property
    def description(self) -> str:
        """What it holds, for the log."""
        record = self.record
        bad = f", {record.num_bad} of pairs that could not be read" if record.num_bad else ""
        return (
            f"reference cache {self.folder}: errors of {record.num_computed} (pair, visit) of {record.num_pairs} pairs "
            f"in up to {record.num_visits} visits{bad}; made of {record.source_description}"
        )

    def require_covers(self, *, max_train_steps: int, pairs_per_step: int, seed: int) -> None:
        """Raise ConfigError where a run would meet a (pair, visit) that is not there, saying how many.

        Takes no time that grows with pairs or steps, but for the steps of one epoch where there are buckets.
        """
        record, coverage = self.record, self.record.coverage
        order = PairOrder(record.bucket_sizes, pairs_per_step=pairs_per_step, seed=seed)
        buckets = len(record.bucket_sizes)
        if coverage.holds(max_train_steps, pairs_per_step=pairs_per_step, order=order, num_buckets=buckets):
            return
        needed = max_train_steps * pairs_per_step
        missing = self._count_missing(order, num_steps=max_train_steps, pairs_per_step=pairs_per_step)
        steps = self._steps_that_fit(order, pairs_per_step=pairs_per_step, most=max_train_steps)
        shorter = f", or take max_train_steps {steps}" if steps else ""
        raise ConfigError(
            f"reference.cache {self.folder} lacks {missing} of the {needed} (pair, visit) that {max_train_steps} steps "
            f"of {pairs_per_step} pairs meet: run scripts/cache.py --reference again with max_train_steps "
            f"{max_train_steps}, or with --visits {max(order.visits_begun(max_train_steps))}{shorter}"
        )

    def require_fits(self, wanted: Mapping[str, str]) -> None:
        """Raise ConfigError naming each part in which the cache is not of what a run wants."""
        changes = differences(self.record.fingerprint, wanted, asker="this run")
        why = "its errors are not those of this run's reference"
        refuse_if_stale("reference.cache", self.folder, changes, why=why, program="scripts/cache.py --reference")

    def read(self, index: int, visit: int) -> tuple[float, float]:
        """Return the errors of the chosen and the rejected image.

        Raises BadRowError where the pair could not be read when they were computed, and DataError where they were not.
        """
        if visit < self.record.num_visits:
            row = self._rows[visit * self.record.num_pairs + index]
            chosen, rejected = float(row["chosen"]), float(row["rejected"])
            if chosen == BAD:
                raise BadRowError(f"pair {index}", f"it could not be read when {self.folder} was made")
            if chosen == chosen and rejected == rejected:
                return chosen, rejected
        raise DataError(
            f"{self.folder}: no reference error of pair {index} in visit {visit}; it stands in for a pair that could "
            "be read when the cache was made: mend that one, or make the cache again, with whole --visits"
        )

    def _count_missing(self, order: PairOrder, *, num_steps: int, pairs_per_step: int) -> int:
        coverage, buckets = self.record.coverage, len(self.record.bucket_sizes)
        if buckets == 1:
            return num_steps * pairs_per_step - coverage.num_positions
        first = coverage.num_positions // pairs_per_step if pairs_per_step == coverage.pairs_per_step else 0
        positions = range(first * pairs_per_step, num_steps * pairs_per_step)
        return sum(order.place(position)[1] >= coverage.whole_visits for position in positions)

    def _steps_that_fit(self, order: PairOrder, *, pairs_per_step: int, most: int) -> int:
        """Return the most steps that the cache is enough for."""
        buckets, fits, too_many = len(self.record.bucket_sizes), 0, most
        while too_many - fits > 1:
            steps = (fits + too_many) // 2
            if self.record.coverage.holds(steps, pairs_per_step=pairs_per_step, order=order, num_buckets=buckets):
                fits = steps
            else:
                too_many = steps
        return fits


def open_reference_errors(folder: str | Path, *, say: Say) -> ReferenceErrors:
    """Open a finished cache, and say what it holds. Raises DataError where it is not whole."""
    errors = ReferenceErrors(Path(folder).expanduser())
    say(errors.description)
    return errors


class PairsWithReferenceErrors:
    """Pairs whose samples bring the reference's errors; a loader.PairReader of what the inner one gives."""

    def __init__(self, pairs: PairReader[Any], errors: ReferenceErrors) -> None:
        """Join pairs with a cache that fits them."""
        self._pairs, self._errors = pairs, errors

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of pairs of each bucket."""
        return self._pairs.bucket_sizes

    def read(self, index: int, visit: int) -> DrawnPairs:
        """Return a pair with the draws of a visit and its errors, B = 1.

        Raises BadRowError where it cannot be read, or could not when the errors were computed: the run then takes the
        stand-in that the cache's making took.
        """
        sample: DrawnPairs = self._pairs.read(index, visit)
        chosen, rejected = self._errors.read(index, visit)
        return replace(
            sample, reference_chosen_error=torch.tensor([chosen]), reference_rejected_error=torch.tensor([rejected])
        )

    def join(self, parts: list[Any]) -> Any:
        """Put samples of one bucket behind one another."""
        return self._pairs.join(parts)
