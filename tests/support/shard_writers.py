"""Small sets of Pick-a-Pic's columns as several programs write them: a folder of parquet files from columns."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pair_files import file_of, picture

NUM_ROWS = 4


def columns_of(first: int = 0, num_rows: int = NUM_ROWS, **changes: pa.Array) -> dict[str, pa.Array]:
    """Return rows first, first + 1, ...; image 0 wins the even ones, image 1 the odd ones. None leaves a column out."""
    rows = range(first, first + num_rows)
    columns = {
        "caption": pa.array([f"prompt {row}" for row in rows], pa.string()),
        "jpg_0": pa.array([file_of(picture(2 * row)) for row in rows], pa.binary()),
        "jpg_1": pa.array([file_of(picture(2 * row + 1)) for row in rows], pa.binary()),
        "label_0": pa.array([float(row % 2 == 0) for row in rows], pa.float64()),
    }
    return {name: column for name, column in (columns | changes).items() if column is not None}


def write_shards(folder: Path, *shards: dict[str, pa.Array]) -> Path:
    """Write each shard as train-NNNNN-of-NNNNN.parquet, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, columns in enumerate(shards):
        write(folder / f"train-{number:05}-of-{len(shards):05}.parquet", columns)
    return folder


def write(path: Path, columns: dict[str, pa.Array], **options: object) -> Path:
    """Write one file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path
