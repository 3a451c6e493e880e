"""A cache of reference errors on disk: one table, and reference.json, which is written last.

    reference.json      ReferenceRecord: what the errors were computed from, and the table's size and SHA-256
    errors_N.npy        an ERRORS_ROW at visit * num_pairs + index; N is the number of places computed
    work/               exists only while the cache is made

A folder without reference.json is not such a cache.
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
# The reference's mean squared errors on both images. Both are NOT_COMPUTED, or BAD if the pair could not be read.
ERRORS_ROW = np.dtype([("chosen", "<f4"), ("rejected", "<f4")])
NOT_COMPUTED = float("nan")
BAD = -1.0


class Coverage(RecordPart):
    """Which pair visits a cache holds: those that a run needs, or all pairs in a number of visits.

    num_positions: positions of the run's order from 0 on, in steps of pairs_per_step. whole_visits: visits of all pairs
    of every bucket. With a single bucket both describe the same pair visits.
    """

    num_positions: int
    pairs_per_step: int
    whole_visits: int

    @classmethod
    def of_run(cls, num_steps: int, *, pairs_per_step: int, bucket_sizes: list[int]) -> Coverage:
        """Return the coverage of num_steps steps."""
        num_positions = num_steps * pairs_per_step
        whole = num_positions // bucket_sizes[0] if len(bucket_sizes) == 1 else 0
        return cls(num_positions=num_positions, pairs_per_step=pairs_per_step, whole_visits=whole)

    @classmethod
    def of_visits(cls, visits: int, *, pairs_per_step: int, bucket_sizes: list[int]) -> Coverage:
        """Return the coverage of any run that reads no pair more than `visits` times."""
        num_positions = visits * bucket_sizes[0] if len(bucket_sizes) == 1 else 0
        return cls(num_positions=num_positions, pairs_per_step=pairs_per_step, whole_visits=visits)

    def holds(self, num_steps: int, *, pairs_per_step: int, order: PairOrder, num_buckets: int) -> bool:
        """Whether a run of num_steps steps finds all its pair visits here. order: the run's."""
        # with one bucket the order does not depend on how it is cut into steps
        same_order = num_buckets == 1 or pairs_per_step == self.pairs_per_step
        if same_order and num_steps * pairs_per_step <= self.num_positions:
            return True
        return max(order.visits_begun(num_steps)) <= self.whole_visits


class ReferenceRecord(RecordPart):
    """The content of reference.json.

    fingerprint: what training compares, by name. num_visits: rows of the table for each pair. shard_pairs, batch_pairs:
    how the errors were computed, so that an extension gives the same bits. num_computed, num_bad: pair visits that were
    computed, and that could not be read.
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
        # a record is an untrusted file too: it must not lead the reader out of its folder
        if list(self.files) != [self.table] or PurePosixPath(self.table).name != self.table:
            raise ValueError(f"{self.table} is not a file of the cache")
        return self


def read_reference_record(folder: Path) -> ReferenceRecord:
    """Read reference.json. Raises DataError if it does not exist or is not of this version."""
    state = _what_it_is(folder)
    return read_record_file(folder / RECORD_NAME, ReferenceRecord, format_version=FORMAT_VERSION, state_without=state)


def _what_it_is(folder: Path) -> str:
    if (folder / PAIR_CACHE_NAME).is_file():
        return "is a cache of encoded pairs; give it to data.cache"
    if work_of(folder).is_dir():
        return "was not finished: run scripts/cache.py --reference again"
    return "is not a cache of reference errors; scripts/cache.py --reference makes one"
