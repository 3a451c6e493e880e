"""What a cache of reference errors is on disk: one table, and reference.json, which is written last.

    reference.json      ReferenceRecord: of what the errors are, and the table's size and SHA-256
    errors_N.npy        ERRORS_ROW at visit * num_pairs + index, after N places were computed
    work/               only while it is made

A folder without reference.json is no such cache.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import model_validator

from ds_dpo.data.stream.order import PairOrder
from ds_dpo.encoding.cache.record import RECORD_NAME as PAIR_CACHE_NAME
from ds_dpo.making.folder import work_of
from ds_dpo.making.record import RecordPart, read_record_file
from ds_dpo.storage.manifest import FileEntry

FORMAT_VERSION = 1
RECORD_NAME = "reference.json"
# Mean squared errors of the reference, chosen and rejected; both NOT_COMPUTED, or both BAD: it could not be read.
ERRORS_ROW = np.dtype([("chosen", "<f4"), ("rejected", "<f4")])
NOT_COMPUTED = float("nan")
BAD = -1.0


class Coverage(RecordPart):
    """Which (pair, visit) are there: those that a run meets, or all of so many visits.

    num_positions: the positions of the run's order from 0 on, in steps of pairs_per_step. whole_visits: of every
    bucket; where there is one bucket, both say the same.
    """

    num_positions: int
    pairs_per_step: int
    whole_visits: int

    @classmethod
    def of_run(cls, num_steps: int, *, pairs_per_step: int, bucket_sizes: list[int]) -> Coverage:
        """Return what num_steps steps need."""
        num_positions = num_steps * pairs_per_step
        whole = num_positions // bucket_sizes[0] if len(bucket_sizes) == 1 else 0
        return cls(num_positions=num_positions, pairs_per_step=pairs_per_step, whole_visits=whole)

    @classmethod
    def of_visits(cls, visits: int, *, pairs_per_step: int, bucket_sizes: list[int]) -> Coverage:
        """Return what any run needs that meets no pair more than `visits` times."""
        num_positions = visits * bucket_sizes[0] if len(bucket_sizes) == 1 else 0
        return cls(num_positions=num_positions, pairs_per_step=pairs_per_step, whole_visits=visits)

    def holds(self, num_steps: int, *, pairs_per_step: int, order: PairOrder, num_buckets: int) -> bool:
        """Return whether a run of so many steps finds all that it meets; `order` is the run's."""
        # with one bucket the order does not depend on how it is cut into steps
        same_order = num_buckets == 1 or pairs_per_step == self.pairs_per_step
        if same_order and num_steps * pairs_per_step <= self.num_positions:
            return True
        return max(order.visits_begun(num_steps)) <= self.whole_visits


class ReferenceRecord(RecordPart):
    """The content of reference.json.

    fingerprint: what training compares, by name. num_visits: rows of the table for each pair. shard_pairs, batch_pairs:
    how it was computed, so that it can be gone on with to the same bits. num_bad: (pair, visit) that could not be read.
    """

    format: int = FORMAT_VERSION
    fingerprint: dict[str, str]
    source_description: str
    software: dict[str, str]
    num_pairs: int
    bucket_sizes: list[int]
    num_visits: int
    coverage: Coverage
    num_computed: int
    num_bad: int
    shard_pairs: int
    batch_pairs: int
    table: str
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def the_table_is_a_file_of_the_folder(self) -> ReferenceRecord:
        # a record is an untrusted file too: it must not send the reader outside of its folder
        if list(self.files) != [self.table] or PurePosixPath(self.table).name != self.table:
            raise ValueError(f"{self.table} is no file of the cache")
        return self


def read_reference_record(folder: Path) -> ReferenceRecord:
    """Read reference.json. Raises DataError where there is none, or it is not one of this version."""
    state = _what_it_is(folder)
    return read_record_file(folder / RECORD_NAME, ReferenceRecord, format_version=FORMAT_VERSION, state_without=state)


def _what_it_is(folder: Path) -> str:
    if (folder / PAIR_CACHE_NAME).is_file():
        return "is a cache of encoded pairs; it goes to data.cache"
    if work_of(folder).is_dir():
        return "was not finished: run scripts/cache.py --reference again"
    return "is no cache of reference errors; scripts/cache.py --reference makes one"
