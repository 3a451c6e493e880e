"""Record batches of Arrow streams, the files that `datasets` writes, by number; memory holds only their offsets.

A pyarrow table would hold objects for every column of every batch, and `datasets` writes a batch for each 100 rows of
images: that is 40 MB for 10**6 rows, in every process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.errors import DataError


class ArrowStreams:
    """The batches of several streams with the same schema, in order.

    starts: number of each batch's first row, (number of batches,) int64; empty batches are left out.
    """

    def __init__(self, sources: Sequence[pa.NativeFile], names: Sequence[str]) -> None:
        """Find the offsets of all batches. sources: mapped files or buffers. names: of the sources, for messages.

        Raises DataError if one is torn, or has another schema than the first.
        """
        self._sources = list(sources)
        self._numbers, self._offsets, lengths = array("q"), array("q"), array("q")
        self.schema = pa.schema([])
        for number, (source, name) in enumerate(zip(sources, names, strict=True)):
            try:
                schema = pa.ipc.open_stream(source).schema.remove_metadata()
                for offset, num_rows in _places(source, schema):
                    if num_rows:
                        self._numbers.append(number)
                        self._offsets.append(offset)
                        lengths.append(num_rows)
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{name} is not a complete Arrow file ({error}); delete its folder and start again"
                ) from error
            if number and schema != self.schema:
                raise DataError(f"{name} has other columns than {names[0]}; delete their folder and start again")
            self.schema = schema
        ends = np.cumsum(np.array(lengths, dtype=np.int64))
        self.num_rows = int(ends[-1]) if len(ends) else 0
        self.starts: NDArray[np.int64] = ends - np.array(lengths, dtype=np.int64)

    def batch(self, number: int) -> pa.RecordBatch:
        """Return a batch; its columns are mapped, not read."""
        source = self._sources[self._numbers[number]]
        source.seek(self._offsets[number])
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), self.schema)

    def table(self, columns: Sequence[str], num_rows: int) -> pa.Table:
        """Return the first num_rows rows of some columns."""
        schema = pa.schema([self.schema.field(column) for column in columns])
        needed = int(np.searchsorted(self.starts, num_rows, side="left"))
        batches = [self.batch(number).select(list(columns)) for number in range(needed)]
        return pa.Table.from_batches(batches, schema=schema).slice(0, num_rows)


def map_streams(files: Sequence[Path]) -> ArrowStreams:
    """Map files from disk. Raises DataError if one is missing or torn."""
    try:
        sources = [pa.memory_map(str(path)) for path in files]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"an Arrow file cannot be opened ({error}); delete its folder and start again") from error
    return ArrowStreams(sources, [str(path) for path in files])


def _places(source: pa.NativeFile, schema: pa.Schema) -> Iterator[tuple[int, int]]:
    """Yield the offset and number of rows of each following batch in a stream."""
    while True:
        offset = source.tell()
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        if message.type != "record batch":
            raise pa.ArrowInvalid(f"{message.type} at byte {offset}, where a record batch would fit")
        yield offset, pa.ipc.read_record_batch(message, schema).num_rows
