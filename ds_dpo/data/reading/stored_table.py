"""Rows of files without random access, converted once and stored as Arrow next to the index of pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from ds_dpo.data.reading.arrow_streams import ArrowStreams, map_streams
from ds_dpo.data.reading.rows import ArrowRows
from ds_dpo.errors import DataError
from ds_dpo.outside import parse_json
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replace_file, replacing

FOLDER = "ds_dpo_rows"
ROWS_OF_A_BATCH = 10_000


class Hasher(Protocol):
    """Collects a hash of content."""

    def update(self, content: bytes, /) -> None:
        """Add to the hash."""


# makes all rows, and gives the hasher everything that determines them
MakeBatches = Callable[[Hasher], Iterator[pa.RecordBatch]]


def open_stored(folder: Path, key: str, make: MakeBatches, *, say: Say) -> ArrowRows:
    """Return the rows stored as folder/key, memory-mapped, or make them and store them there.

    A torn file is made again. If the folder cannot be written, the rows stay in memory, and `say` reports it.
    """
    place = place_of_rows(folder, key)
    if (found := read_stored(place)) is not None:
        return found
    try:
        store(make, place)
    except OSError as error:
        say(
            f"{place} cannot be written ({error.strerror or error}): its rows stay in memory, and the next start makes "
            "them again"
        )
    return read_stored(place) or _in_memory(make)


def place_of_rows(folder: Path, key: str) -> Path:
    """Return the file of stored rows."""
    return folder / FOLDER / f"{key}.arrow"


def store(make: MakeBatches, place: Path) -> None:
    """Write next to the place and rename. The facts come last: rows without them are ignored. Raises OSError."""
    hasher = hashlib.sha256()
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place, sync=True) as temporary:
        with open(temporary, "wb") as stream:
            _write(make(hasher), stream)
        facts = {"bytes": temporary.stat().st_size, "content": hasher.hexdigest()[:32]}
    replace_file(_facts_file(place), json.dumps(facts), sync=False)  # a torn one is made again


def _facts_file(place: Path) -> Path:
    return place.with_suffix(".json")


def read_stored(place: Path) -> ArrowRows | None:
    """Return the rows of a file, or None if it is missing or not complete."""
    try:
        facts = parse_json(_facts_file(place).read_text())
        if place.stat().st_size != facts["bytes"]:
            return None
        return ArrowRows(map_streams([place]), content=facts["content"])
    except (OSError, ValueError, TypeError, KeyError, DataError):
        return None


def _write(batches: Iterator[pa.RecordBatch], stream: object) -> None:
    first = next(batches)
    with pa.ipc.new_stream(stream, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _in_memory(make: MakeBatches) -> ArrowRows:
    hasher = hashlib.sha256()
    sink = pa.BufferOutputStream()
    _write(make(hasher), sink)
    streams = ArrowStreams([pa.BufferReader(sink.getvalue())], ["rows in memory"])
    return ArrowRows(streams, content=hasher.hexdigest()[:32])
