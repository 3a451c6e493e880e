"""Make the index of a dataset's pairs: choose them from columns, and sort them by aspect bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.config.data import DataConfig
from ds_dpo.data.buckets import bucket_shapes, choose_bucket
from ds_dpo.data.images import read_size
from ds_dpo.data.reading.image_states import NotedImages, is_io_error
from ds_dpo.data.reading.labels_file import content_of_labels, read_labels
from ds_dpo.data.reading.pair_identity import candidate_ids, columns_of_ids, has_own_ids
from ds_dpo.data.reading.records import RecordReader
from ds_dpo.data.reading.rows import Rows, state_of_files
from ds_dpo.data.reading.split_files import SplitFiles
from ds_dpo.data.selection.candidates import columns_of_candidates, find_candidates, rows_of_no_pair, with_unranked
from ds_dpo.data.selection.filters import Setting, choose_pairs, columns_of_filters
from ds_dpo.data.selection.formats import Columns
from ds_dpo.data.selection.pair_index import ENTRY, PairIndex, make_index
from ds_dpo.data.selection.prompt_share import PromptShare
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

# increase it if the same settings give another index
INDEX_VERSION = 2
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


def build_index(
    rows: Rows,
    columns: Columns,
    reader: RecordReader,
    data: DataConfig,
    part: PromptShare | None,
    *,
    name: str,
    say: Say,
) -> PairIndex:
    """Choose the pairs of rows. name: of the dataset, for messages. Raises DataError for an unusable column."""
    num_rows = len(rows) if data.max_rows is None else min(len(rows), data.max_rows)
    labels = None if data.labels is None else read_labels(Path(data.labels))
    needed = {*columns_of_candidates(rows.schema, columns), *columns_of_filters(columns, data)}
    if labels is not None:
        needed |= {*columns_of_ids(columns)}
    table = _read_columns(rows, sorted(needed), num_rows, name)
    candidates = find_candidates(table, columns, num_rows=num_rows, grouped=reader.grouped, name=name)
    rows_of_one = rows_of_no_pair(table, columns, grouped=reader.grouped)
    unranked = [row for row in rows_of_one if reader.lacks_verdicts(int(row))]
    if unranked:
        candidates = with_unranked(candidates, np.array(unranked, dtype=np.int64))
    num_unlabelled = None
    if labels is not None:
        num_candidates = len(candidates)
        candidates = labels.apply(candidates, candidate_ids(table, columns, candidates, name=name))
        num_unlabelled = num_candidates - len(candidates)
        if not len(candidates):
            raise _no_pair_is_labelled(data, columns, name)
    setting = Setting(data=data, table=table, columns=columns.of_role, grouped=reader.grouped, name=name, part=part)
    chosen = choose_pairs(candidates, setting, num_unlabelled=num_unlabelled)
    entries = np.empty(len(chosen.candidates), dtype=ENTRY)
    entries["row"], entries["first"] = chosen.candidates.row, chosen.candidates.first
    entries["second"], entries["target"], entries["weight"] = chosen.candidates.second, chosen.target, chosen.weight
    if not data.aspect_buckets:
        shape = (data.resolution, data.resolution)
        return make_index(entries, counts=chosen.counts, bucket_sizes=[len(entries)], bucket_shapes=[shape])
    return _index_by_bucket(entries, chosen.counts, reader, data, name=name, say=say)


def _no_pair_is_labelled(data: DataConfig, columns: Columns, name: str) -> DataError:
    words = "" if has_own_ids(columns) else f"; its pairs have ids of row numbers and the name {name!r}"
    return DataError(
        f"{name}: data.labels {data.labels} has no label for any of its pairs{words}; make the labels with "
        "scripts/relabel.py and the same data options"
    )


def _read_columns(rows: Rows, columns: Sequence[str], num_rows: int, name: str) -> pa.Table:
    try:
        return rows.table(columns, num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name}: columns {', '.join(columns)} cannot be read: {error}") from error


def _index_by_bucket(
    entries: NDArray[np.void],
    counts: Mapping[str, int],
    reader: RecordReader,
    data: DataConfig,
    *,
    name: str,
    say: Say,
) -> PairIndex:
    """Return the index of entries, sorted by bucket and otherwise in order, with the buckets that have any."""
    shapes = bucket_shapes(data.resolution, step=data.bucket_step, max_aspect=data.max_aspect)
    square = min(range(len(shapes)), key=lambda bucket: abs(shapes[bucket][0] - shapes[bucket][1]))
    noted = NotedImages(find_file=reader.find_file)
    reader = replace(reader, find_file=noted)
    buckets = np.empty(len(entries), dtype=np.int64)
    unread: list[str] = []
    for number, entry in enumerate(entries):
        if number % PAIRS_BETWEEN_LINES == 0:
            say(f"{name}: reading image sizes for aspect buckets, {number} of {len(entries)} pairs")
        try:
            chosen, rejected = reader.images(
                row=int(entry["row"]), first=int(entry["first"]), second=int(entry["second"])
            )
            buckets[number] = choose_bucket(read_size(chosen), read_size(rejected), shapes)
        except DataError as error:
            buckets[number] = square  # counted as a bad row when it is read
            if is_io_error(error):
                unread.append(str(error))
    if unread:
        say(f"{len(unread)} pairs have sizes that cannot be read now, so the next start reads all again: {unread[0]}")
    sizes = np.bincount(buckets, minlength=len(shapes))
    used = [bucket for bucket, size in enumerate(sizes) if size]
    return make_index(
        entries[np.argsort(buckets, kind="stable")],
        counts=counts,
        bucket_sizes=[int(sizes[bucket]) for bucket in used],
        bucket_shapes=[shapes[bucket] for bucket in used],
        images=noted.states,
        is_kept=not unread,
    )


def index_key(found: SplitFiles, data: DataConfig, root: Path, part: PromptShare | None) -> str:
    """Return a hash of what an index is made from, as far as it is known without opening an image."""
    settings = {setting: getattr(data, setting) for setting in SETTINGS_OF_INDEX}
    if data.aspect_buckets:
        settings |= {setting: getattr(data, setting) for setting in SETTINGS_OF_BUCKETS} | {"root": str(root)}
        settings["images"] = "by state"  # an index without the states of its images has another key
    parts = {
        "version": INDEX_VERSION,
        "files": state_of_files(found.files),
        "rows": None if found.dataset is None else found.dataset._fingerprint,
        "settings": settings,
    }
    if not data.aspect_buckets:
        parts["resolution"] = data.resolution  # the size of the only bucket
    if data.labels is not None:
        parts["labels"] = content_of_labels(Path(data.labels))
    if part is not None:
        parts["part"] = [part.share, part.side]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
