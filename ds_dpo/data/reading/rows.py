"""Rows of a dataset behind one interface: memory-mapped Arrow in any order, or parquet in file order without a copy."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ds_dpo.data.reading.arrow_streams import ArrowStreams
from ds_dpo.errors import DataError

ROWS_DECODED_AT_ONCE = 32  # of parquet; a row with two images of 1024 x 1024 has about 2 MB
NUM_BATCHES_KEPT = 8  # so that rows near each other can be read alternately

# row number -> value by column; images as they are stored
RowReader = Callable[[int], Mapping[str, Any]]


class Rows(Protocol):
    """All rows and columns of a dataset, before any filter."""

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types."""

    @property
    def content(self) -> str:
        """Identifies the content, for fingerprints; does not depend on where the files are."""

    def __len__(self) -> int: ...

    def table(self, columns: Sequence[str], num_rows: int) -> pa.Table:
        """Return the first num_rows rows of some columns; the others are not read."""

    def reader(self, columns: Sequence[str]) -> RowReader:
        """Return a function that reads one row of some columns; forked processes may call it."""


class ArrowRows:
    """Rows of memory-mapped Arrow streams, quick to read in any order."""

    def __init__(self, streams: ArrowStreams, *, content: str) -> None:
        self._streams = streams
        self._content = content

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types."""
        return self._streams.schema

    @property
    def content(self) -> str:
        """Identifies the content."""
        return self._content

    def __len__(self) -> int:
        return self._streams.num_rows

    def has_values(self, column: str) -> bool:
        """Whether any row has a value that is not null."""
        return bool(self.table([column], len(self)).column(column).null_count < len(self))

    def table(self, columns: Sequence[str], num_rows: int) -> pa.Table:
        """Return the first rows of these columns."""
        return self._streams.table(columns, num_rows)

    def reader(self, columns: Sequence[str]) -> RowReader:
        """Return a function that reads one row of some columns, in any order."""
        numbers = {column: self.schema.get_field_index(column) for column in columns}
        streams = self._streams

        def read(row: int) -> Mapping[str, Any]:
            number = int(np.searchsorted(streams.starts, row, side="right")) - 1
            batch, place = streams.batch(number), row - int(streams.starts[number])
            return {column: batch.column(index)[place].as_py() for column, index in numbers.items()}

        return read


class ParquetRows:
    """Rows read straight from parquet files, without a copy; quick only in file order."""

    def __init__(self, files: Sequence[Path], *, root: Path) -> None:
        """Read the files' footers. Raises DataError if one is not parquet, or has other columns than the first."""
        self._files = list(files)
        self._root = root
        starts, places, num_rows = [], [], 0
        for number, path in enumerate(self._files):
            metadata, schema = _footer(path)
            if number == 0:
                self._schema = schema
            if _types(schema) != _types(self._schema):
                raise DataError(_other_columns(self._files[0], self._schema, path, schema))
            for group in range(metadata.num_row_groups):
                starts.append(num_rows)
                places.append((number, group))
                num_rows += metadata.row_group(group).num_rows
        self._starts: NDArray[np.int64] = np.array(starts, dtype=np.int64)
        self._places = places
        self._num_rows = num_rows

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types."""
        return self._schema

    @property
    def content(self) -> str:
        """Identifies the content by the names and sizes of the files."""
        return content_of_files(self._files, root=self._root)

    def __len__(self) -> int:
        return self._num_rows

    def table(self, columns: Sequence[str], num_rows: int) -> pa.Table:
        """Return the first rows of these columns."""
        tables: list[pa.Table] = []
        num_read = 0
        for path in self._files:
            if num_read >= num_rows and tables:
                break
            tables.append(pq.read_table(path, columns=list(columns), partitioning=None))
            num_read += tables[-1].num_rows
        return pa.concat_tables(tables).slice(0, num_rows)

    def reader(self, columns: Sequence[str]) -> RowReader:
        """Return a function that reads one row of some columns; going back in a row group decodes it again."""
        return _FileOrderReader(self._files, self._starts, self._places, columns)


class _FileOrderReader:
    """Decodes a few rows ahead, and keeps the last ones."""

    def __init__(
        self,
        files: Sequence[Path],
        starts: NDArray[np.int64],
        places: Sequence[tuple[int, int]],
        columns: Sequence[str],
    ) -> None:
        self._files, self._starts, self._places, self._columns = files, starts, places, list(columns)
        self._open_file: tuple[int, pq.ParquetFile] | None = None
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
        return batch.slice(row - first, 1).to_pylist()[0]

    def _kept(self, row: int) -> tuple[int, pa.RecordBatch] | None:
        for first, batch in reversed(self._recent):
            if first <= row < first + batch.num_rows:
                return first, batch
        return None

    def _next_batch(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except (OSError, pa.ArrowException) as error:
            number, group_of_file = self._places[self._group]
            raise DataError(f"{self._files[number]}: row group {group_of_file} cannot be read: {error}") from error

    def _start(self, group: int) -> None:
        number, group_of_file = self._places[group]
        if self._open_file is None or self._open_file[0] != number:
            # buffer_size makes it stream a row group, whose images may be hundreds of megabytes
            self._open_file = (number, pq.ParquetFile(self._files[number], buffer_size=2**20))
        self._group, self._next_row = group, int(self._starts[group])
        # no threads: Arrow's do not survive the fork of a loader process
        self._batches = self._open_file[1].iter_batches(
            ROWS_DECODED_AT_ONCE, row_groups=[group_of_file], columns=self._columns, use_threads=False
        )


def content_of_files(files: Sequence[Path], *, root: Path) -> str:
    """Return a hash of the files' names, relative to root, and sizes."""
    lines = [f"{path.relative_to(root)} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def state_of_files(files: Sequence[Path]) -> str:
    """Return a hash of paths, sizes and times of change: it also changes if a file is written again unchanged."""
    states = [(str(path.absolute()), path.stat()) for path in files]
    lines = [f"{place} {state.st_size} {state.st_mtime_ns}" for place, state in states]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _footer(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata, file.schema_arrow.remove_metadata()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _types(schema: pa.Schema) -> set[str]:
    return {f"{field.name} ({field.type})" for field in schema}


def _other_columns(first: Path, first_schema: pa.Schema, path: Path, schema: pa.Schema) -> str:
    ours, theirs = _types(first_schema), _types(schema)
    return (
        f"{path} has other columns than {first.name}: only there {', '.join(sorted(theirs - ours)) or 'none'}, only in "
        f"{first.name} {', '.join(sorted(ours - theirs)) or 'none'}; files of a split share their columns"
    )
