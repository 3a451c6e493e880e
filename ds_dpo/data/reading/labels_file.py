"""Files of labels: parquet with a row for each pair, joined to a data set by pair id; data.labels names one.

Columns: pair_id (int64), uid (the pair's name, for people), label, margin, probability, scorer, version. label and
probability are about the image with the lower number in the row: in Pick-a-Pic's form image 0, with chosen and rejected
columns the chosen one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.data.reading.parquet_rows import batches_of_shards
from ds_dpo.data.reading.shards import read_footers
from ds_dpo.data.selection.labels import PairLabels
from ds_dpo.errors import DataError
from ds_dpo.outside import open_regular

LABELS_SCHEMA = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("uid", pa.string()),
        ("label", pa.float64()),
        ("margin", pa.float64()),
        ("probability", pa.float64()),
        ("scorer", pa.string()),
        ("version", pa.string()),
    ]
)
NEEDED = ("pair_id", "label")


def content_of_labels(path: Path) -> str:
    """Return a hash of a file of labels. Raises DataError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data.labels {path} cannot be read: {error.strerror or error}") from error


def read_labels(path: Path) -> PairLabels:
    """Read a file of labels; only the columns pair_id, label and, if it is there, probability matter.

    Raises DataError that names the file, and the column and row of a value that cannot be one.
    """
    name = f"data.labels {path}"
    content_of_labels(path)  # a file that is missing, or no file, has its own words
    shards = read_footers([path], name)
    available = shards[0].schema.names
    if missing := [column for column in NEEDED if column not in available]:
        raise DataError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(available)}, and scripts/relabel.py writes "
            f"{', '.join(LABELS_SCHEMA.names)}"
        )
    wanted = [field for field in LABELS_SCHEMA if field.name in (*NEEDED, "probability") and field.name in available]
    schema = pa.schema(wanted)
    table = pa.Table.from_batches(batches_of_shards(shards, schema), schema=schema)
    ids = _ids(table.column("pair_id"), name)
    labels = _numbers(table.column("label"))
    _require(np.isin(labels, (0, 0.5, 1)), labels, "label", "1, 0.5 or 0", name)
    probabilities = np.full(len(ids), np.nan)
    if "probability" in available:
        probabilities = _numbers(table.column("probability"))
        is_fit = np.isnan(probabilities) | ((probabilities >= 0) & (probabilities <= 1))
        _require(is_fit, probabilities, "probability", "0 to 1", name)
    order = np.argsort(ids, kind="stable")
    return PairLabels(ids=ids[order], labels=labels[order], probabilities=probabilities[order])


def _ids(column: pa.ChunkedArray, name: str) -> NDArray[np.int64]:
    if column.null_count:
        row = int(np.flatnonzero(np.asarray(column.is_null()))[0])
        raise DataError(f"{name}: pair_id is null in row {row}; the id of a pair would fit")
    ids = np.asarray(column.to_numpy(), dtype=np.int64)
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        rows = np.flatnonzero(ids == distinct[np.argmax(counts > 1)])
        raise DataError(f"{name}: rows {rows[0]} and {rows[1]} have the same pair_id; each pair has one label")
    return ids


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)


def _require(is_fit: NDArray[np.bool_], values: NDArray[np.float64], column: str, fits: str, name: str) -> None:
    if not is_fit.all():
        row = int(np.argmin(is_fit))
        raise DataError(f"{name}: {column} is {values[row]:g} in row {row}; {fits} would fit")
