"""Open a dataset's pairs: find its files and columns, choose the pairs, index them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.config.data import DataConfig
from ds_dpo.data.buckets import bucket_shapes, choose_bucket
from ds_dpo.data.images import read_size
from ds_dpo.data.reading.arrow_copy import cache_folder, open_as_arrow
from ds_dpo.data.reading.arrow_streams import map_streams
from ds_dpo.data.reading.image_files import ImageFiles
from ds_dpo.data.reading.records import PICKAPIC_ID, RecordReader
from ds_dpo.data.reading.rows import ArrowRows, ParquetRows, RowReader, Rows, content_of_files, state_of_files
from ds_dpo.data.reading.split_files import SplitFiles, find_split
from ds_dpo.data.reading.stored_table import open_stored
from ds_dpo.data.reading.tar_rows import member_reader, roles_found, tar_batches
from ds_dpo.data.reading.text_rows import text_batches
from ds_dpo.data.selection.candidates import columns_of_candidates, find_candidates, is_grouped
from ds_dpo.data.selection.column_types import require_types
from ds_dpo.data.selection.filters import Setting, choose_pairs, columns_of_filters, describe_counts
from ds_dpo.data.selection.formats import (
    ROLES_OF_LAYOUT,
    Columns,
    choose_columns,
    find_columns,
    require_columns_of_settings,
)
from ds_dpo.data.selection.pair_index import ENTRY, PairIndex, make_index, open_index
from ds_dpo.data.source import PairRecord, PairSource
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

# increase these if the same settings give another index, or other stored rows
INDEX_VERSION, ROWS_VERSION = 1, 1
PAIRS_BETWEEN_LINES = 50_000
# what determines an index, in addition to the rows
SETTINGS_OF_INDEX = (
    "format",
    "columns",
    "ties",
    "confidence",
    "min_confidence",
    "models",
    "has_label",
    "max_pairs_per_prompt",
    "max_rows",
    "aspect_buckets",
)
SETTINGS_OF_BUCKETS = ("resolution", "bucket_step", "max_aspect")


@dataclass(frozen=True, kw_only=True)
class IndexedPairs:
    """A PairSource: the pairs of an index, read by a reader."""

    name: str
    reader: RecordReader
    index: PairIndex
    fingerprint: Mapping[str, str]

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


def open_source(data: DataConfig, *, say: Say, in_file_order: bool = False) -> PairSource:
    """Open the pairs of data.split of data.dataset that pass data's filters.

    in_file_order: read parquet straight from its files, without a copy, which is quick only along file_order(). say:
    gets lines for the user. Raises DataError if the dataset, split or a column does not exist, a label is unusable,
    there are ties and data.ties is error, no pair is left, or the disk is too small for the copy.
    """
    name = f"{data.dataset}, split {data.split}"
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
        _index_key(found, data, root),
        lambda: _build_index(rows, columns, reader, data, name=name, say=say),
        say=say,
    )
    if not len(index.entries):
        raise DataError(f"{name}: {describe_counts(index.facts.counts)}; no pair is left to train on")
    _compare_with_expected(len(index.entries), data, name, say)
    fingerprint = _fingerprint(rows, columns, index, name)
    return IndexedPairs(name=name, reader=reader, index=index, fingerprint=fingerprint)


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
    columns = find_columns(rows.schema.names, data, name)
    return _Opened(rows=rows, columns=columns, read_row=_reader(rows, columns))


def _table_rows(found: SplitFiles, data: DataConfig, name: str, *, say: Say, in_file_order: bool) -> Rows:
    if found.kind == "text":
        make = text_batches(found.files, data, name)
        return open_stored(cache_folder(data), _stored_key(found, data), make, say=say)
    if found.dataset is not None:
        return ArrowRows(map_streams(found.files), content=found.dataset._fingerprint)
    if in_file_order:
        return ParquetRows(found.files, root=found.root)
    streams = open_as_arrow(found.files, data, say=say)
    return ArrowRows(streams, content=content_of_files(found.files, root=found.root))


def _reader(rows: Rows, columns: Columns) -> RowReader:
    return rows.reader(sorted(set(columns.of_role.values())))


def _stored_key(found: SplitFiles, data: DataConfig) -> str:
    parts = [ROWS_VERSION, state_of_files(found.files), data.format, data.columns]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build_index(
    rows: Rows, columns: Columns, reader: RecordReader, data: DataConfig, *, name: str, say: Say
) -> PairIndex:
    num_rows = len(rows) if data.max_rows is None else min(len(rows), data.max_rows)
    needed = {*columns_of_candidates(rows.schema, columns), *columns_of_filters(columns, data)}
    table = _read_columns(rows, sorted(needed), num_rows, name)
    candidates = find_candidates(table, columns, num_rows=num_rows, grouped=reader.grouped, name=name)
    setting = Setting(data=data, table=table, columns=columns.of_role, grouped=reader.grouped, name=name)
    chosen = choose_pairs(candidates, setting)
    entries = np.empty(len(chosen.candidates), dtype=ENTRY)
    entries["row"], entries["first"] = chosen.candidates.row, chosen.candidates.first
    entries["second"], entries["target"], entries["weight"] = chosen.candidates.second, chosen.target, chosen.weight
    if not data.aspect_buckets:
        sizes, shapes = [len(entries)], [(data.resolution, data.resolution)]
    else:
        entries, sizes, shapes = _sort_by_bucket(entries, reader, data, name=name, say=say)
    return make_index(entries, counts=chosen.counts, bucket_sizes=sizes, bucket_shapes=shapes)


def _read_columns(rows: Rows, columns: Sequence[str], num_rows: int, name: str) -> pa.Table:
    try:
        return rows.table(columns, num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name}: columns {', '.join(columns)} cannot be read: {error}") from error


def _sort_by_bucket(
    entries: NDArray[np.void], reader: RecordReader, data: DataConfig, *, name: str, say: Say
) -> tuple[NDArray[np.void], list[int], list[tuple[int, int]]]:
    """Return entries, sorted by bucket and otherwise in order, and the sizes and shapes of buckets that have any."""
    shapes = bucket_shapes(data.resolution, step=data.bucket_step, max_aspect=data.max_aspect)
    square = min(range(len(shapes)), key=lambda bucket: abs(shapes[bucket][0] - shapes[bucket][1]))
    buckets = np.empty(len(entries), dtype=np.int64)
    for number, entry in enumerate(entries):
        if number % PAIRS_BETWEEN_LINES == 0:
            say(f"{name}: reading image sizes for aspect buckets, {number} of {len(entries)} pairs")
        try:
            chosen, rejected = reader.images(
                row=int(entry["row"]), first=int(entry["first"]), second=int(entry["second"])
            )
            buckets[number] = choose_bucket(read_size(chosen), read_size(rejected), shapes)
        except DataError:
            buckets[number] = square  # counted as a bad row when it is read
    sizes = np.bincount(buckets, minlength=len(shapes))
    used = [bucket for bucket, size in enumerate(sizes) if size]
    order = np.argsort(buckets, kind="stable")
    return entries[order], [int(sizes[bucket]) for bucket in used], [shapes[bucket] for bucket in used]


def _index_key(found: SplitFiles, data: DataConfig, root: Path) -> str:
    settings = {setting: getattr(data, setting) for setting in SETTINGS_OF_INDEX}
    if data.aspect_buckets:
        settings |= {setting: getattr(data, setting) for setting in SETTINGS_OF_BUCKETS} | {"root": str(root)}
    parts = {
        "version": INDEX_VERSION,
        "files": state_of_files(found.files),
        "rows": None if found.dataset is None else found.dataset._fingerprint,
        "settings": settings,
    }
    if not data.aspect_buckets:
        parts["resolution"] = data.resolution  # the size of the only bucket
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint(rows: Rows, columns: Columns, index: PairIndex, name: str) -> Mapping[str, str]:
    telling = {*ROLES_OF_LAYOUT[columns.layout], "group", "id", *PICKAPIC_ID}
    roles = [role for role in columns.of_role if role in telling]
    has_own_ids = "id" in columns.of_role or set(PICKAPIC_ID) <= columns.of_role.keys()
    shapes = ", ".join(f"{height}x{width}" for height, width in index.facts.bucket_shapes)
    return {
        "content": rows.content,
        "columns": ", ".join(f"{role}={columns.of_role[role]}" for role in sorted(roles)),
        "pair_ids": "the rows' own" if has_own_ids else f"row numbers of {name}",
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
