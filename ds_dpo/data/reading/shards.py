"""The parquet files of a split as one table: their footers are compared before any row is read or copied.

Only columns that a role reads matter, and only files that have rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ds_dpo.data.reading.arrow_types import one_type, plain_type
from ds_dpo.data.reading.parquet_footer import column_bytes
from ds_dpo.data.selection.formats import KIND_OF_ROLE, Columns
from ds_dpo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A parquet file that has rows, with its footer."""

    path: Path
    metadata: pq.FileMetaData
    schema: pa.Schema


def read_footers(files: Sequence[Path], name: str) -> list[Shard]:
    """Return the files that have rows. Raises DataError that names a damaged file, or if no file has rows."""
    shards = [shard for shard in map(_footer, files) if shard.metadata.num_rows]
    if not shards:
        raise DataError(f"{name} has no rows: {len(files)} files, the first is {files[0]}")
    return shards


def columns_of(shards: Sequence[Shard]) -> list[str]:
    """Return the names of the columns that any file has."""
    return list(dict.fromkeys(column for shard in shards for column in shard.schema.names))


def common_schema(shards: Sequence[Shard], columns: Columns) -> pa.Schema:
    """Return the columns that roles read, each in a type that holds the values of all files.

    Raises DataError that names the file and the column if a file lacks one, has it twice, or in a type that does not
    go together with that of another file.
    """
    kinds = {column: KIND_OF_ROLE[role] for role, column in columns.of_role.items()}
    return pa.schema([(column, _common_type(shards, column, kind)) for column, kind in sorted(kinds.items())])


def uncompressed_bytes(shards: Sequence[Shard], columns: Sequence[str]) -> int:
    """Return the unpacked size of some columns, from the footers. Raises DataError that names a damaged file."""
    return sum(sizes.get(column, 0) for sizes in map(_column_bytes, shards) for column in set(columns))


def _footer(path: Path) -> Shard:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow.remove_metadata()
            _read_names(schema)
            return Shard(path=path, metadata=file.metadata, schema=schema)
    # a damaged footer may claim text that is not UTF-8, or more memory than there is
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def _read_names(fields: Iterable[pa.Field]) -> None:
    """Raise UnicodeDecodeError for a name of a field, or of one in it, that is not UTF-8: it shows when it is read."""
    for field in fields:
        assert field.name is not None
        _read_names(field.type.field(number) for number in range(field.type.num_fields))


def _column_bytes(shard: Shard) -> dict[str, int]:
    try:
        return column_bytes(shard.path)
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path} cannot be read as parquet: {first_line(error)}") from error


def _common_type(shards: Sequence[Shard], column: str, kind: str) -> pa.DataType:
    having = next(shard for shard in shards if column in shard.schema.names)
    by_type: dict[pa.DataType, Shard] = {}
    for shard in shards:
        number = shard.schema.names.count(column)
        if number == 0:
            raise DataError(
                f"{shard.path} has no column {column}, and {having.path.name} has one; files of a split share the "
                "columns that are read"
            )
        if number > 1:
            raise DataError(f"{shard.path} has column {column} {number} times; rename one of them, or leave it out")
        by_type.setdefault(plain_type(shard.schema.field(column).type, kind), shard)
    common = one_type(list(by_type), kind)
    if common is None:
        (first, of_first), (other, of_other) = _first_misfit(by_type, kind)
        raise DataError(
            f"{of_other.path} has column {column} as {other}, and {of_first.path.name} as {first}; files of a split "
            "share the types of columns that are read"
        )
    return common


def _first_misfit(
    by_type: dict[pa.DataType, Shard], kind: str
) -> tuple[tuple[pa.DataType, Shard], tuple[pa.DataType, Shard]]:
    found = list(by_type.items())
    return next(
        (earlier, later)
        for place, later in enumerate(found)
        for earlier in found[:place]
        if one_type([earlier[0], later[0]], kind) is None
    )


def first_line(error: BaseException) -> str:
    """Return what an error of a library says in its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
