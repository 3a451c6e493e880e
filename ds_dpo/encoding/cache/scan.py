"""First pass over the pairs: read each one, and find by hashes which images and prompts are the same."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.data.source import BadRowError, PairSource, RawImage
from ds_dpo.encoding.cache.shard_file import new_shard, read_columns
from ds_dpo.making.tasks import run_tasks

SIDES = ("chosen", "rejected")
PAIRS_OF_TASK = 16
# chosen_is_lower: whether the chosen image has the lower number in the row. error: why the row cannot be read; prompt,
# keys and chosen_is_lower are then null
SCAN_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("pair_id", pa.int64()),
        ("uid", pa.string()),
        ("prompt", pa.string()),
        ("prompt_key", pa.binary(16)),
        ("chosen_key", pa.binary(16)),
        ("rejected_key", pa.binary(16)),
        ("target_probability", pa.float32()),
        ("weight", pa.float32()),
        ("chosen_is_lower", pa.bool_()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Finds the bucket of a pair, whose shape its images are cut to."""

    sizes: Sequence[int]
    shapes: Sequence[tuple[int, int]]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes))

    def of(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def of_all(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(np.array(self._ends), indices, side="right")


@dataclass(frozen=True)
class _Reader:
    source: PairSource
    buckets: Buckets

    def __call__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self._row(int(index)) for index in indices]

    def _row(self, index: int) -> Mapping[str, Any]:
        try:
            record = self.source.read(index)
            prompt_key = key_of_prompt(record.prompt)
        except BadRowError as error:
            return _unreadable(index, uid=error.bad_row.uid, reason=error.bad_row.reason)
        except UnicodeEncodeError:
            return _unreadable(index, uid=record.uid, reason="prompt: holds half of a surrogate pair, which is no text")
        shape = self.buckets.shapes[self.buckets.of(index)]
        return {
            "index": index,
            "pair_id": record.pair_id,
            "uid": record.uid,
            "prompt": record.prompt,
            "prompt_key": prompt_key,
            "chosen_key": key_of_image(record.chosen, shape, otherwise=f"chosen {index}"),
            "rejected_key": key_of_image(record.rejected, shape, otherwise=f"rejected {index}"),
            "target_probability": record.target_probability,
            "weight": record.weight,
            "chosen_is_lower": record.image_numbers[0] < record.image_numbers[1],
            "error": None,
        }


def _unreadable(index: int, *, uid: str, reason: str) -> Mapping[str, Any]:
    # nothing is ever drawn with this id: reading the pair from the cache raises the same error
    empty = dict.fromkeys(("prompt", "prompt_key", "chosen_key", "rejected_key", "chosen_is_lower"))
    return {"index": index, "pair_id": 0, "uid": uid, "target_probability": 1, "weight": 1, "error": reason, **empty}


def key_of_prompt(prompt: str) -> bytes:
    return blake2b(prompt.encode(), digest_size=16).digest()


def key_of_image(raw: RawImage | None, shape: tuple[int, int], *, otherwise: str) -> bytes:
    """Return a key that is the same for images with the same file and the same training shape.

    otherwise: hashed instead, for an image without a readable file. Among 10**9 images, two different ones share a key
    with a probability of 1e-21.
    """
    digest = blake2b(f"{shape[0]}x{shape[1]}\0".encode(), digest_size=16)
    content = raw.get("bytes") if isinstance(raw, Mapping) else raw
    if isinstance(content, bytes):
        digest.update(b"file\0" + content)
        return digest.digest()
    if isinstance(content, Image.Image):
        with contextlib.suppress(OSError, ValueError, SyntaxError):  # torn: reported when it is decoded for encoding
            pixels = content.tobytes()
            # what decoding also depends on: palette, transparency, orientation
            looks = (content.mode, content.size, content.getpalette(), content.info.get("transparency"))
            digest.update(f"image\0{looks}{sorted(content.getexif().items())}\0".encode() + pixels)
            return digest.digest()
    digest.update(f"none\0{otherwise}".encode())
    return digest.digest()


def scan_unit(source: PairSource, indices: Sequence[int], path: Path, *, buckets: Buckets, workers: int) -> None:
    """Write a row of SCAN_SCHEMA for each of the pairs, in the given order."""
    tasks = [indices[start : start + PAIRS_OF_TASK] for start in range(0, len(indices), PAIRS_OF_TASK)]
    with new_shard(path, SCAN_SCHEMA) as shard:
        for rows in run_tasks(_Reader(source, buckets), tasks, workers=workers):
            for row in rows:
                shard.rows.add(row)


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """The distinct ones among things in numbered places, in the order in which they occur first.

    row_of: the row of the thing at each place, -1 for an empty place. first: the place where each row occurs first.
    keys: the key of each row.
    """

    row_of: NDArray[np.int64]
    first: NDArray[np.int64]
    keys: pa.Array

    def rows_between(self, start: int, end: int) -> range:
        """Return the rows that occur first at a place in [start, end)."""
        begin, stop = np.searchsorted(self.first, (start, end))
        return range(int(begin), int(stop))


def find_distinct(keys: pa.ChunkedArray | pa.Array) -> Distinct:
    """Find the distinct keys. keys: one for each place, null for an empty place."""
    array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    encoded = array.dictionary_encode()
    row_of = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    rows, first = np.unique(row_of, return_index=True)
    return Distinct(row_of=row_of, first=first[rows >= 0].astype(np.int64), keys=encoded.dictionary)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """All pairs in file order, and what is distinct among them.

    images: place 2 * pair is the chosen image, 2 * pair + 1 the rejected one. prompts: place 0 is '', place 1 + pair
    the pair's prompt.
    """

    pairs: pa.Table
    images: Distinct
    prompts: Distinct


def read_scan(paths: Sequence[Path], *, columns: Sequence[str]) -> Scan:
    """Join the scans of all units. columns: the columns of SCAN_SCHEMA to read in addition to the keys."""
    keys = ("prompt_key", "chosen_key", "rejected_key")
    pairs = pa.concat_tables([read_columns(path, [*keys, *columns]) for path in paths]).combine_chunks()
    both = pa.concat_arrays([pairs[f"{side}_key"].combine_chunks() for side in SIDES])
    by_turns = np.arange(2 * len(pairs)).reshape(2, -1).T.ravel()
    prompts = pa.concat_arrays([pa.array([key_of_prompt("")], pa.binary(16)), pairs["prompt_key"].combine_chunks()])
    images = find_distinct(both.take(pa.array(by_turns)))
    return Scan(pairs=pairs, images=images, prompts=find_distinct(prompts))
