"""The shards of a cache: Arrow IPC files, written in one pass and opened by any Arrow library.

Arrow's file format keeps bytes as they are (without compression, so a row is one run of bytes in the file), accepts
rows batch by batch, has a footer that shows that the file is complete, and can be opened elsewhere, for example with
`datasets.load_dataset("arrow", data_files=...)`. Training does not read through Arrow: the cache's tables hold the
offset of each row's bytes, which `pread` reads straight into a tensor. Mapping the shards instead would count every
page that was read as memory of the worker, would load 4 KiB at a time from network file systems, and would end the
process (SIGBUS) if a disk fails or a file was cut short.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.errors import DataError
from ds_dpo.storage.manifest import FileEntry
from ds_dpo.storage.replace import replacing

BATCH_BYTES = 2**24  # of rows that are held in memory before they are written
BATCH_ROWS = 1024

# moments: (2C, H, W) or (C, H, W). mirrored: the same for the mirrored image. error: why it cannot be decoded.
IMAGE_SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("moments", pa.binary()),
        ("mirrored", pa.binary()),
        ("pixel_height", pa.int32()),
        ("pixel_width", pa.int32()),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("corner_top", pa.int32()),
        ("corner_left", pa.int32()),
        ("error", pa.string()),
    ]
)
PROMPT_SCHEMA = pa.schema(
    [("key", pa.binary(16)), ("prompt", pa.string()), ("text_states", pa.binary()), ("pooled", pa.binary())]
)


class RowWriter:
    """Takes rows one by one, and holds at most a batch of them in memory."""

    def __init__(self, writer: pa.RecordBatchFileWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._rows: list[Mapping[str, Any]] = []
        self._num_bytes = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row: a value, or None, for each column."""
        self._rows.append(row)
        self._num_bytes += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if self._num_bytes >= BATCH_BYTES or len(self._rows) >= BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(list(self._rows), schema=self._schema))
        self._rows, self._num_bytes = [], 0


class _HashedFile(io.RawIOBase):
    """A file that is written from start to end, and its SHA-256."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


class WrittenShard:
    """What `new_shard` yields: add rows to `rows`; `entry` is set once the shard is complete."""

    rows: RowWriter
    entry: FileEntry


@contextlib.contextmanager
def new_shard(path: Path, schema: pa.Schema, *, metadata: Mapping[str, str] | None = None) -> Iterator[WrittenShard]:
    """Write a shard under a temporary name; it is synced and renamed at the end, or removed after an error.

    metadata: added to the schema, for people and other programs. Raises DataError if it cannot be written.
    """
    shard = WrittenShard()
    try:
        with replacing(path, sync=True) as temporary, temporary.open("wb") as file:
            hashed = _HashedFile(file)
            with pa.ipc.new_file(pa.PythonFile(hashed, mode="w"), schema.with_metadata(metadata)) as writer:
                shard.rows = RowWriter(writer, schema)
                yield shard
                shard.rows.flush()
            shard.entry = FileEntry(size=file.tell(), sha256=hashed.digest.hexdigest())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error})") from error


@contextlib.contextmanager
def opened_shard(path: Path) -> Iterator[tuple[pa.Buffer, pa.RecordBatchFileReader]]:
    """Yield a shard's mapped bytes and a reader of them. Raises DataError if it is not a complete Arrow file."""
    try:
        with pa.memory_map(str(path)) as file:
            buffer = file.read_buffer()
            yield buffer, pa.ipc.open_file(buffer)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as an Arrow file ({error})") from error


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Return some columns of a shard as a table; the others are not read from disk."""
    with opened_shard(path) as (_, reader):
        batches = [reader.get_batch(number).select(columns) for number in range(reader.num_record_batches)]
        if not batches:
            return reader.schema.empty_table().select(columns)
        # copied: mapped memory ends with the open file
        return pa.Table.from_batches(batches).take(pa.array(range(sum(map(len, batches))), pa.int64()))


def value_offsets(path: Path, column: str) -> NDArray[np.int64]:
    """Return the offset of each row's bytes in a binary column, counted from the start of the file; -1 for null."""
    with opened_shard(path) as (buffer, reader):
        batches = (reader.get_batch(number).column(column) for number in range(reader.num_record_batches))
        parts = [_offsets_in(array, start=buffer.address) for array in batches]
        return np.concatenate([np.empty(0, np.int64), *parts])


def _offsets_in(array: pa.BinaryArray, *, start: int) -> NDArray[np.int64]:
    if array.null_count == len(array):
        return np.full(len(array), -1, np.int64)
    _, ends, values = array.buffers()
    begins = np.frombuffer(ends, np.int32)[array.offset : array.offset + len(array)]
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    return np.where(is_null, -1, begins.astype(np.int64) + (values.address - start))
