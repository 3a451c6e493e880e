"""The pairs of a dataset as one memory-mapped array on disk: a process holds only the parts that it reads.

Legend: P pairs, sorted by aspect bucket, then in file order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ds_dpo.outside import parse_json
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import partial_path

# row: of the unfiltered dataset. first, second: numbers of the chosen and the rejected image in the row.
ENTRY = np.dtype([("row", "<i8"), ("first", "<u2"), ("second", "<u2"), ("target", "<f4"), ("weight", "<f4")])
FOLDER = "ds_dpo_pair_index"
ENTRIES_FILE, FACTS_FILE, IMAGES_FILE = "pairs.npy", "index.json", "images.json"


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What is known of an index without reading it.

    counts: as in PairSource. bucket_shapes: (height, width) in pixels. pairs: hash of all entries.
    """

    counts: Mapping[str, int]
    bucket_sizes: Sequence[int]
    bucket_shapes: Sequence[Sequence[int]]
    pairs: str


@dataclass(frozen=True, kw_only=True)
class PairIndex:
    """An index of pairs. entries: (P,) of ENTRY.

    images: state of each image file that it was made from, by path; None if no image was looked at. is_kept: False if
    it may not be stored, since an image could not be read for a reason that may pass.
    """

    entries: NDArray[np.void]
    facts: IndexFacts
    images: Mapping[str, str] | None = None
    is_kept: bool = True


def make_index(
    entries: NDArray[np.void],
    *,
    counts: Mapping[str, int],
    bucket_sizes: Sequence[int],
    bucket_shapes: Sequence[tuple[int, int]],
    images: Mapping[str, str] | None = None,
    is_kept: bool = True,
) -> PairIndex:
    """Return an index, in memory, of sorted entries."""
    facts = IndexFacts(
        counts=dict(counts),
        bucket_sizes=list(bucket_sizes),
        bucket_shapes=[list(shape) for shape in bucket_shapes],
        pairs=hashlib.sha256(np.ascontiguousarray(entries).tobytes()).hexdigest()[:32],
    )
    return PairIndex(entries=entries, facts=facts, images=images, is_kept=is_kept)


def open_index(
    folder: Path,
    key: str,
    build: Callable[[], PairIndex],
    *,
    changed_images: Callable[[Mapping[str, str]], Sequence[str]],
    say: Say,
) -> PairIndex:
    """Return the index stored as folder/key, or build it and store it there.

    changed_images: returns the images whose state is not the given one. A torn index, or one made from images that have
    changed since, is built again. If the folder cannot be written, the index stays in memory, and `say` reports it.
    """
    place = folder / FOLDER / key
    if (found := _read(place)) is not None:
        changed = changed_images(found.images or {})
        if not changed:
            return found
        say(f"image sizes are read again: {len(changed)} images changed since, the first is {changed[0]}")
        shutil.rmtree(place, ignore_errors=True)
    index = build()
    if not index.is_kept:
        return index
    try:
        _write(index, place)
    except OSError as error:
        megabytes = index.entries.nbytes / 1e6
        say(
            f"the index of pairs cannot be written to {place} ({error.strerror or error}): it stays in memory "
            f"({megabytes:.1f} MB of each process), and the next start builds it again"
        )
        return index
    return _read(place) or index


def _read(place: Path) -> PairIndex | None:
    """Return the index in a folder, or None if it is missing or not complete."""
    try:
        facts = IndexFacts(**parse_json((place / FACTS_FILE).read_text()))
        entries = np.lib.format.open_memmap(place / ENTRIES_FILE, mode="r")  # does not unpickle anything
        images = parse_json((place / IMAGES_FILE).read_text()) if (place / IMAGES_FILE).exists() else None
        if not all(isinstance(state, str) for state in (images or {}).values()):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    is_whole = entries.dtype == ENTRY and entries.shape == (facts.counts["pairs"],)
    return PairIndex(entries=entries, facts=facts, images=images) if is_whole else None


def _write(index: PairIndex, place: Path) -> None:
    """Write next to the place and rename. The first of several processes wins: all of them write the same."""
    temporary = partial_path(place)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with open(temporary / ENTRIES_FILE, "wb") as file:
            np.save(file, index.entries, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        (temporary / FACTS_FILE).write_text(json.dumps(asdict(index.facts), indent=1))
        if index.images is not None:
            (temporary / IMAGES_FILE).write_text(json.dumps(index.images))
        if place.exists() and _read(place) is None:
            shutil.rmtree(place)
        try:
            temporary.rename(place)
        except OSError:
            if _read(place) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
