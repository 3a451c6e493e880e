"""Open a dataset's pairs: find its files and columns, choose the pairs, index them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ds_dpo.config.asset_paths import is_local
from ds_dpo.config.data import DataConfig
from ds_dpo.data.reading.arrow_copy import cache_folder, open_copy
from ds_dpo.data.reading.arrow_streams import map_streams
from ds_dpo.data.reading.build_index import build_index, index_key
from ds_dpo.data.reading.image_files import ImageFiles
from ds_dpo.data.reading.image_states import changed_images
from ds_dpo.data.reading.pair_identity import ID_ROLES, has_own_ids
from ds_dpo.data.reading.parquet_rows import ParquetRows
from ds_dpo.data.reading.problems import PROBLEMS, with_problems
from ds_dpo.data.reading.records import RecordReader
from ds_dpo.data.reading.rows import ArrowRows, RowReader, Rows, content_of_files, state_of_files
from ds_dpo.data.reading.shards import columns_of, read_footers
from ds_dpo.data.reading.split_files import SplitFiles, find_split
from ds_dpo.data.reading.stored_table import open_stored
from ds_dpo.data.reading.tar_rows import member_reader, roles_found, tar_batches
from ds_dpo.data.reading.text_rows import text_batches
from ds_dpo.data.selection.candidates import is_grouped
from ds_dpo.data.selection.column_types import require_types
from ds_dpo.data.selection.filters import describe_counts
from ds_dpo.data.selection.formats import (
    ROLES_OF_LAYOUT,
    Columns,
    choose_columns,
    find_columns,
    require_columns_of_settings,
)
from ds_dpo.data.selection.pair_index import PairIndex, open_index
from ds_dpo.data.selection.prompt_share import PromptShare
from ds_dpo.data.source import PairRecord, PairSource
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

# increase it if the same settings give other stored rows
ROWS_VERSION = 2
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class IndexedPairs:
    """A PairSource: the pairs of an index, read by a reader."""

    name: str
    reader: RecordReader
    index: PairIndex
    fingerprint: Mapping[str, str]
    commit: str | None

    @property
    def description(self) -> str:
        """For the log: what was opened, the number of rows, how many each filter left out, the number of pairs."""
        line = f"{self.name}: {describe_counts(self.counts)}"
        if len(self.bucket_shapes) == 1:
            return line
        sizes = [
            f"{height}x{width}: {size}"
            for (height, width), size in zip(self.bucket_shapes, self.bucket_sizes, strict=True)
        ]
        return f"{line}; by height x width {', '.join(sizes)}"

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts by name."""
        return self.index.facts.counts

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of pairs in each bucket."""
        return self.index.facts.bucket_sizes

    @property
    def bucket_shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width in pixels of each bucket's training images."""
        return [(int(height), int(width)) for height, width in self.index.facts.bucket_shapes]

    def file_order(self) -> NDArray[np.int64]:
        """Return all indices in the order of the pairs in the dataset's files."""
        if len(self.bucket_sizes) == 1:
            return np.arange(len(self))
        return np.argsort(self.index.entries["row"], kind="stable")

    def __len__(self) -> int:
        return len(self.index.entries)

    def read(self, index: int) -> PairRecord:
        """Return a pair. Raises BadRowError if its prompt is not text or an image is missing."""
        entry = self.index.entries[index]
        return self.reader.read(
            row=int(entry["row"]),
            first=int(entry["first"]),
            second=int(entry["second"]),
            target=float(entry["target"]),
            weight=float(entry["weight"]),
        )


def open_source(
    data: DataConfig, *, say: Say, in_file_order: bool = False, part: PromptShare | None = None
) -> PairSource:
    """Open the pairs of data.split of data.dataset that pass data's filters.

    in_file_order: read parquet straight from its files, without a copy, which is quick only along file_order(). say:
    gets lines for the user. part: the side of the prompts whose pairs are wanted; None: all. Raises DataError if the
    dataset, split or a column does not exist, a label is unusable, there are ties and data.ties is error, no pair is
    left, or the disk is too small for the copy.
    """
    name = f"{data.dataset}, " + (f"files {' '.join(data.files)}" if data.files else f"split {data.split}")
    found = find_split(data)
    opened = _open_rows(found, data, name, say=say, in_file_order=in_file_order)
    rows, columns = opened.rows, opened.columns
    require_types(rows.schema, columns, name)
    require_columns_of_settings(columns, data, name)
    grouped = is_grouped(rows.schema, columns)
    root = found.root if data.image_root is None else Path(data.image_root).expanduser()
    reader = RecordReader(
        read_row=opened.read_row,
        columns=columns,
        grouped=grouped,
        name=name,
        find_file=ImageFiles(root=root).locate,
    )
    index = open_index(
        cache_folder(data),
        index_key(found, data, root, part),
        lambda: build_index(rows, columns, reader, data, part, name=name, say=say),
        changed_images=partial(changed_images, find_file=reader.find_file),
        say=say,
    )
    if not len(index.entries):
        purpose = "to hold out" if part is not None and part.side == "held_out" else "to train on"
        raise DataError(f"{name}: {describe_counts(index.facts.counts)}; no pair is left {purpose}")
    num_held_out = index.facts.counts.get("dropped_held_out", 0)
    _compare_with_expected(len(index.entries) + num_held_out, data, name, say)
    fingerprint = _fingerprint(rows, columns, index, name)
    commit = None if is_local(data.dataset) else commit_of(found.root)
    return IndexedPairs(name=name, reader=reader, index=index, fingerprint=fingerprint, commit=commit)


def commit_of(folder: Path) -> str | None:
    """Return the commit in the path of a folder that the hub's client downloaded, None for any other folder."""
    found = [after for before, after in pairwise(folder.parts) if before == "snapshots" and COMMIT.fullmatch(after)]
    return found[-1] if found else None


@dataclass(frozen=True, kw_only=True)
class _Opened:
    rows: Rows
    columns: Columns
    read_row: RowReader


def _open_rows(found: SplitFiles, data: DataConfig, name: str, *, say: Say, in_file_order: bool) -> _Opened:
    if found.kind == "tar":
        make = tar_batches(found.files, data, name, say=say)
        tar_rows = open_stored(cache_folder(data), _stored_key(found, data), make, say=say)
        columns = choose_columns(roles_found(tar_rows, data), tar_rows.schema.names, data, name)
        return _Opened(rows=tar_rows, columns=columns, read_row=member_reader(_reader(tar_rows, columns), found.files))
    rows = _table_rows(found, data, name, say=say, in_file_order=in_file_order)
    columns = find_columns([column for column in rows.schema.names if column != PROBLEMS], data, name)
    return _Opened(rows=rows, columns=columns, read_row=_reader(rows, columns))


def _table_rows(found: SplitFiles, data: DataConfig, name: str, *, say: Say, in_file_order: bool) -> Rows:
    if found.kind == "text":
        make = text_batches(found.files, data, name)
        return open_stored(cache_folder(data), _stored_key(found, data), make, say=say)
    if found.dataset is not None:
        return ArrowRows(map_streams(found.files), content=found.dataset._fingerprint)
    content = content_of_files(found.files, root=found.root)

    def open_parquet() -> ParquetRows:
        shards = read_footers(found.files, name)
        return ParquetRows(shards, find_columns(columns_of(shards), data, name), content=content)

    if in_file_order:
        return open_parquet()
    return open_copy(_stored_key(found, data), open_parquet, data, say=say).with_content(content)


def _reader(rows: Rows, columns: Columns) -> RowReader:
    read = sorted(set(columns.of_role.values()))
    if PROBLEMS in rows.schema.names:
        return with_problems(rows.reader([*read, PROBLEMS]))
    return rows.reader(read)


def _stored_key(found: SplitFiles, data: DataConfig) -> str:
    parts = [ROWS_VERSION, state_of_files(found.files), data.format, data.columns]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _fingerprint(rows: Rows, columns: Columns, index: PairIndex, name: str) -> Mapping[str, str]:
    telling = {*ROLES_OF_LAYOUT[columns.layout], "group", *ID_ROLES}
    roles = [role for role in columns.of_role if role in telling]
    shapes = ", ".join(f"{height}x{width}" for height, width in index.facts.bucket_shapes)
    return {
        "content": rows.content,
        "columns": ", ".join(f"{role}={columns.of_role[role]}" for role in sorted(roles)),
        "pair_ids": "the rows' own" if has_own_ids(columns) else f"row numbers of {name}",
        "pairs": index.facts.pairs,
        "buckets": shapes if len(index.facts.bucket_shapes) > 1 else "one",
    }


def _compare_with_expected(num_pairs: int, data: DataConfig, name: str, say: Say) -> None:
    if data.expected_pairs is None:
        return
    if num_pairs == data.expected_pairs:
        say(f"{name}: {num_pairs} pairs, as expected")
    else:
        say(f"warning: {name}: {num_pairs} pairs, but data.expected_pairs is {data.expected_pairs}")
