"""Rows of a CSV, TSV or parquet file with prompts, each as names and values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError, cut
from ds_dpo.outside import check_regular


def read_csv(path: Path, text: str, *, delimiter: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows below the line of names. Tabs are used without quotes, as in PartiPrompts.

    Raises ConfigError for what is no such table.
    """
    lines = io.StringIO(text)
    try:
        if delimiter == "\t":
            yield from csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            yield from csv.DictReader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise ConfigError(f"--prompts {path}: not a table ({cut(str(error))})") from error


def read_parquet(path: Path, *, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a parquet file, with those of the columns that it has. Raises ConfigError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_regular(path)
        with pq.ParquetFile(path) as file:
            names = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=names):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"--prompts {path}: cannot be read as parquet ({cut(str(error))})") from error
