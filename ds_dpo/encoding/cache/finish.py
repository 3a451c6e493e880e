"""Last pass, on one rank: write the tables that say where everything is, and the record that finishes the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.data.source import PairSource
from ds_dpo.encoding.cache.plan import Layout
from ds_dpo.encoding.cache.record import (
    BAD_PAIRS,
    IMAGE_ROW,
    IMAGES,
    PAIR_ROW,
    PAIRS,
    PROMPT_ROW,
    PROMPTS,
    RECORD_NAME,
    CacheRecord,
    StoredImages,
    StoredText,
)
from ds_dpo.encoding.cache.scan import SIDES, Buckets, Distinct, Scan, read_scan
from ds_dpo.encoding.cache.shard_file import new_shard, read_columns, value_offsets
from ds_dpo.errors import DataError
from ds_dpo.making.record import software_versions, write_record_file, write_rows
from ds_dpo.outside import parse_json
from ds_dpo.storage.manifest import FileEntry, hash_file
from ds_dpo.storage.replace import replace_file

BAD_PAIR_SCHEMA = pa.schema([("index", pa.int64()), ("uid", pa.string()), ("reason", pa.string())])
PAIR_COLUMNS = ("index", "pair_id", "uid", "target_probability", "weight", "error")


def finish(
    layout: Layout, source: PairSource, *, fingerprint: Mapping[str, str], images: StoredImages, text: StoredText
) -> CacheRecord:
    """Write the tables, then cache.json; every unit must exist.

    Raises DataError if a shard does not hold what the scan says.
    """
    units = range(len(layout.units))
    buckets = Buckets(sizes=source.bucket_sizes, shapes=source.bucket_shapes)
    scan = read_scan([layout.scan(unit) for unit in units], columns=PAIR_COLUMNS)
    image_rows, image_errors = _image_rows([layout.images(unit) for unit in units], scan.images, buckets)
    prompt_rows = _prompt_rows([layout.prompts(unit) for unit in units], scan.prompts)
    pair_rows, bad_pairs = _pair_rows(scan, buckets, image_errors)
    files = {
        PAIRS: write_rows(layout.out / PAIRS, pair_rows),
        IMAGES: write_rows(layout.out / IMAGES, image_rows),
        PROMPTS: write_rows(layout.out / PROMPTS, prompt_rows),
        BAD_PAIRS: _write_bad_pairs(layout.out / BAD_PAIRS, bad_pairs),
    }
    image_shards = [layout.images(unit) for unit in units]
    prompt_shards = [layout.prompts(unit) for unit in units]
    for path in (*image_shards, *prompt_shards):
        files[_inside(layout, path)] = shard_entry(layout, path)
    record = CacheRecord(
        fingerprint=dict(fingerprint),
        source_description=source.description,
        source_counts={name: int(count) for name, count in source.counts.items()},
        source_fingerprint=dict(source.fingerprint),
        software=software_versions(),
        num_pairs=len(pair_rows),
        num_bad_pairs=len(bad_pairs),
        num_images=len(image_rows),
        num_bad_images=sum(error is not None for error in image_errors),
        num_prompts=len(prompt_rows),
        bucket_sizes=[int(size) for size in source.bucket_sizes],
        bucket_shapes=[(int(height), int(width)) for height, width in source.bucket_shapes],
        images=images,
        text=text,
        image_shards=[_inside(layout, path) for path in image_shards],
        prompt_shards=[_inside(layout, path) for path in prompt_shards],
        files=files,
    )
    write_record_file(layout.out / RECORD_NAME, record)
    return record


def _image_rows(
    shards: Sequence[Path], images: Distinct, buckets: Buckets
) -> tuple[NDArray[np.void], list[str | None]]:
    """Return an IMAGE_ROW for each image, and why it cannot be decoded, or None."""
    names = ("original_height", "original_width", "corner_top", "corner_left")
    tables = [read_columns(path, ["key", "pixel_height", "pixel_width", "error", *names]) for path in shards]
    table = pa.concat_tables(tables)
    _require_keys(table["key"], images.keys, shards)
    rows = np.zeros(len(table), IMAGE_ROW)
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(part) for part in tables])
    for column in ("moments", "mirrored"):
        rows[column] = np.concatenate([value_offsets(path, column) for path in shards])
    for name in names:
        rows[name] = table[name].to_numpy()
    shapes = {(int(height), int(width)): bucket for bucket, (height, width) in enumerate(buckets.shapes)}
    sizes = zip(table["pixel_height"].to_pylist(), table["pixel_width"].to_pylist(), strict=True)
    rows["bucket"] = [shapes.get(size, -1) for size in sizes]  # -1: not decoded
    return rows, table["error"].to_pylist()


def _prompt_rows(shards: Sequence[Path], prompts: Distinct) -> NDArray[np.void]:
    tables = [read_columns(path, ["key"]) for path in shards]
    table = pa.concat_tables(tables)
    _require_keys(table["key"], prompts.keys, shards)
    rows = np.zeros(len(table), PROMPT_ROW)
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(part) for part in tables])
    for column in ("text_states", "pooled"):
        rows[column] = np.concatenate([value_offsets(path, column) for path in shards])
    return rows


def _require_keys(found: pa.ChunkedArray, expected: pa.Array, shards: Sequence[Path]) -> None:
    if not found.combine_chunks().equals(expected):
        raise DataError(
            f"{shards[0].parent}: the shards do not hold what was scanned, so another command wrote them; remove the "
            "folder and start again"
        )


def _pair_rows(
    scan: Scan, buckets: Buckets, image_errors: Sequence[str | None]
) -> tuple[NDArray[np.void], list[dict[str, Any]]]:
    """Return a PAIR_ROW for each pair, in the source's order, and the bad pairs with the reason of each."""
    pairs = scan.pairs
    index = pairs["index"].to_numpy()
    in_file_order = np.zeros(len(pairs), PAIR_ROW)
    for name in ("pair_id", "target_probability", "weight"):
        in_file_order[name] = pairs[name].to_numpy()
    in_file_order["bucket"] = buckets.of_all(index)
    in_file_order["prompt"] = scan.prompts.row_of[1:]
    for place, side in enumerate(SIDES):
        in_file_order[side] = scan.images.row_of[place::2]
    rows = np.empty_like(in_file_order)
    rows[index] = in_file_order

    reasons = _reasons(pairs, rows=in_file_order, image_errors=image_errors)
    uids = pairs["uid"]
    bad = [{"index": int(index[place]), "uid": uids[place].as_py(), "reason": why} for place, why in reasons]
    bad.sort(key=lambda pair: pair["index"])
    rows["bad"] = -1
    rows["bad"][[pair["index"] for pair in bad]] = np.arange(len(bad))
    return rows, bad


def _reasons(pairs: pa.Table, *, rows: NDArray[np.void], image_errors: Sequence[str | None]) -> list[tuple[int, str]]:
    """Return the place of each pair that cannot be read, and the reason that online reading gives.

    If both images are bad, that is the chosen image's.
    """
    reasons = {place: error for place, error in enumerate(pairs["error"].to_pylist()) if error is not None}
    is_bad_image = np.array([error is not None for error in image_errors], dtype=bool)  # there may be none
    for side in SIDES:
        has_image = np.flatnonzero(rows[side] >= 0)
        for place in has_image[is_bad_image[rows[side][has_image]]].tolist():
            reasons.setdefault(place, f"{side} image: {image_errors[int(rows[side][place])]}")
    return sorted(reasons.items())


def _write_bad_pairs(path: Path, bad_pairs: Sequence[Mapping[str, Any]]) -> FileEntry:
    with new_shard(path, BAD_PAIR_SCHEMA) as shard:
        for pair in bad_pairs:
            shard.rows.add(pair)
    return shard.entry


def _inside(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.out).as_posix()


def note_entry(layout: Layout, path: Path, entry: FileEntry) -> None:
    """Write down a new shard's size and checksum, so that finishing the cache need not read all shards again."""
    content = json.dumps({"size": entry.size, "sha256": entry.sha256})
    replace_file(_note(layout, path), content, sync=True)


def shard_entry(layout: Layout, path: Path) -> FileEntry:
    """Return a shard's size and checksum; reads the shard if a kill came before they were written down."""
    note = _note(layout, path)
    if not note.is_file():
        return hash_file(path)
    return FileEntry(**parse_json(note.read_text(encoding="utf-8")))


def _note(layout: Layout, path: Path) -> Path:
    return layout.work / f"{path.parent.name}-{path.stem}.json"
