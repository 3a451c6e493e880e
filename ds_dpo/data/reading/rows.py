"""Rows of a dataset behind one interface, and rows of memory-mapped Arrow, in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ds_dpo.data.reading.arrow_streams import ArrowStreams
from ds_dpo.data.reading.arrow_values import read_value, readable_text
from ds_dpo.errors import DataError

# row number -> value by column, Unreadable for one that cannot be read; images as they are stored
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

    def with_content(self, content: str) -> ArrowRows:
        """Return the same rows under another identity."""
        return ArrowRows(self._streams, content=content)

    def has_values(self, column: str) -> bool:
        """Whether any row has a value that is not null."""
        return bool(self.table([column], len(self)).column(column).null_count < len(self))

    def table(self, columns: Sequence[str], num_rows: int) -> pa.Table:
        """Return the first rows of these columns."""
        return with_readable_text(self._streams.table(columns, num_rows))

    def reader(self, columns: Sequence[str]) -> RowReader:
        """Return a function that reads one row of some columns, in any order."""
        numbers = {column: self.schema.get_field_index(column) for column in columns}
        streams = self._streams

        def read(row: int) -> Mapping[str, Any]:
            number = int(np.searchsorted(streams.starts, row, side="right")) - 1
            batch, place = streams.batch(number), row - int(streams.starts[number])
            return {column: read_value(batch.column(index)[place]) for column, index in numbers.items()}

        return read


def with_readable_text(table: pa.Table) -> pa.Table:
    """Return a table for filters: in its text, bytes that are not UTF-8 are replaced; their rows count as bad later."""
    return pa.table([readable_text(column) for column in table.columns], schema=table.schema)


def content_of_files(files: Sequence[Path], *, root: Path) -> str:
    """Return a hash of the files' names, relative to root, and sizes."""
    lines = [f"{path.relative_to(root)} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def state_of_files(files: Sequence[Path]) -> str:
    """Return a hash of paths, sizes and times of change: it also changes if a file is written again unchanged."""
    try:
        states = [(str(path.absolute()), path.stat()) for path in files]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    lines = [f"{place} {state.st_size} {state.st_mtime_ns}" for place, state in states]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
