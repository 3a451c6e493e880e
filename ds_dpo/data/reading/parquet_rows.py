"""Rows read straight from parquet files, in file order, without a copy; or made into the batches of a copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ds_dpo.data.reading.arrow_values import as_type, read_value
from ds_dpo.data.reading.rows import RowReader, with_readable_text
from ds_dpo.data.reading.shards import Shard, common_schema, first_line, uncompressed_bytes
from ds_dpo.data.selection.formats import Columns
from ds_dpo.errors import DataError

# a row with two images of 1024 x 1024 has about 2 MB
ROWS_DECODED_AT_ONCE, BYTES_DECODED_AT_ONCE = 32, 2**27
ROWS_OF_A_COPY_BATCH = 100
ROWS_OF_A_TABLE_BATCH = 10_000
NUM_BATCHES_KEPT = 8  # so that rows near each other can be read alternately


class ParquetRows:
    """Rows of the columns that roles read, from all files of a split; quick only in file order."""

    def __init__(self, shards: Sequence[Shard], columns: Columns, *, content: str) -> None:
        """content: identifies the files. Raises DataError if the files' columns do not go together."""
        self._schema = common_schema(shards, columns)
        self._groups = [_Group(shard, number) for shard in shards for number in range(shard.metadata.num_row_groups)]
        ends = np.cumsum([group.num_rows for group in self._groups], dtype=np.int64)
        self._starts = ends - np.array([group.num_rows for group in self._groups], dtype=np.int64)
        self._num_rows = int(ends[-1]) if len(ends) else 0
        self._content = content
        self._shards = shards

    @property
    def schema(self) -> pa.Schema:
        """The columns that are read, in the types that all files' values get."""
        return self._schema

    @property
    def content(self) -> str:
        """Identifies the content by the names and sizes of the files."""
        return self._content

    @property
    def uncompressed_bytes(self) -> int:
        """Unpacked size of the columns that are read, from the footers. Raises DataError that names a damaged file."""
        return uncompressed_bytes(self._shards, self._schema.names)

    def __len__(self) -> int:
        return self._num_rows

    def table(self, columns: Sequence[str], num_rows: int) -> pa.Table:
        """Return the first rows of these columns."""
        schema = pa.schema([self._schema.field(column) for column in columns])
        batches: list[pa.RecordBatch] = []
        num_read = 0
        for group in self._groups:
            if num_read >= num_rows:
                break
            batches += group.batches(schema, at_once=ROWS_OF_A_TABLE_BATCH)
            num_read += group.num_rows
        return with_readable_text(pa.Table.from_batches(batches, schema=schema).slice(0, num_rows))

    def reader(self, columns: Sequence[str]) -> RowReader:
        """Return a function that reads one row of some columns; going back in a row group decodes it again."""
        schema = pa.schema([self._schema.field(column) for column in columns])
        return _FileOrderReader(self._groups, self._starts, schema)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows, for a copy that is quick in any order. Raises DataError that names a damaged file."""
        for group in self._groups:
            yield from group.batches(self._schema, at_once=ROWS_OF_A_COPY_BATCH)


def batches_of_shards(shards: Sequence[Shard], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield all rows of some columns, in the types of a schema. Raises DataError that names a damaged file."""
    for shard in shards:
        for number in range(shard.metadata.num_row_groups):
            yield from _Group(shard, number).batches(schema, at_once=ROWS_OF_A_TABLE_BATCH)


class _Group:
    """A row group of a file."""

    def __init__(self, shard: Shard, number: int) -> None:
        metadata = shard.metadata.row_group(number)
        self._shard, self._number = shard, number
        self.num_rows = metadata.num_rows
        self._bytes_of_row = metadata.total_byte_size // max(1, metadata.num_rows)

    def batches(self, schema: pa.Schema, *, at_once: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of some columns. Raises DataError that names the file, and the column where it is known."""
        place = f"{self._shard.path}: row group {self._number}"
        # few rows of large images: Arrow cannot decode nested columns of more than 2 GB at once
        at_once = max(1, min(at_once, BYTES_DECODED_AT_ONCE // max(1, self._bytes_of_row)))
        num_read = 0
        try:
            # buffer_size makes it stream a row group, whose images may be hundreds of megabytes
            with pq.ParquetFile(self._shard.path, metadata=self._shard.metadata, buffer_size=2**20) as file:
                # no threads: Arrow's do not survive the fork of a loader process
                for batch in file.iter_batches(
                    at_once, row_groups=[self._number], columns=schema.names, use_threads=False
                ):
                    num_read += batch.num_rows
                    yield _converted(batch, schema, place)
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            raise DataError(f"{place} cannot be read: {first_line(error)}") from error
        if num_read != self.num_rows:
            raise DataError(f"{place} has {num_read} of {self.num_rows} rows; copy or download the file again")


def _converted(batch: pa.RecordBatch, schema: pa.Schema, place: str) -> pa.RecordBatch:
    columns = []
    for field in schema:
        try:
            columns.append(as_type(batch.column(field.name), field.type))
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"{place}: column {field.name} cannot be read as {field.type}: {first_line(error)}"
            ) from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class _FileOrderReader:
    """Decodes a few rows ahead, and keeps the last ones."""

    def __init__(self, groups: Sequence[_Group], starts: NDArray[np.int64], schema: pa.Schema) -> None:
        self._groups, self._starts, self._schema = groups, starts, schema
        self._recent: deque[tuple[int, pa.RecordBatch]] = deque(maxlen=NUM_BATCHES_KEPT)
        self._group, self._next_row = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def __call__(self, row: int) -> Mapping[str, Any]:
        found = self._kept(row)
        if found is None:
            group = int(np.searchsorted(self._starts, row, side="right")) - 1
            if group != self._group or row < self._next_row:
                self._start(group)
            while found is None:
                batch = self._next_batch()
                self._recent.append((self._next_row, batch))
                self._next_row += batch.num_rows
                found = self._kept(row)
        first, batch = found
        return {name: read_value(batch.column(name)[row - first]) for name in batch.schema.names}

    def _kept(self, row: int) -> tuple[int, pa.RecordBatch] | None:
        for first, batch in reversed(self._recent):
            if first <= row < first + batch.num_rows:
                return first, batch
        return None

    def _next_batch(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except DataError:
            self._group = -1  # a generator that raised has nothing more to say the next time
            raise

    def _start(self, group: int) -> None:
        self._group, self._next_row = group, int(self._starts[group])
        self._batches = self._groups[group].batches(self._schema, at_once=ROWS_DECODED_AT_ONCE)
