"""Held-out pairs, encoded once when a run starts; each rank keeps its share in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_dpo.batch import PreferenceBatch
from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.bad_rows import too_many_bad_rows
from ds_dpo.data.stream.loader import PairReader
from ds_dpo.data.stream.order import place_of
from ds_dpo.distributed.collectives import gather_objects, rank, world_size
from ds_dpo.distributed.together import raised_everywhere, said_once
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

VISIT = 0  # each image has one draw of the VAE's posterior for the whole run


@dataclass(frozen=True, kw_only=True)
class HeldOutPairs:
    """This rank's pairs, at least one, each a batch with B = 1 on the CPU.

    pair_ids: those of all ranks' pairs, in order. positions: places of own in pair_ids.
    """

    own: list[PreferenceBatch]
    positions: list[int]
    pair_ids: list[int]


def read_held_out(
    reader: PairReader[Any],
    encode: Callable[[Any], PreferenceBatch],
    *,
    num_pairs: int,
    seed: int,
    max_bad_rows: int,
    say: Say,
) -> HeldOutPairs:
    """Read and encode num_pairs pairs, or all if there are fewer; every rank must call this.

    The seed chooses them, not the number of ranks. A pair that cannot be read is left out and reported. Raises
    DataError on all ranks if more than max_bad_rows cannot be read, or fewer than 2 are left.
    """
    available = sum(reader.bucket_sizes)
    wanted = min(num_pairs, available)
    indices = [place_of(position, num_pairs=available, seed=seed)[0] for position in range(wanted)]

    def read(place: int) -> PreferenceBatch:
        return encode(reader.read(indices[place], VISIT)).to("cpu")

    found: dict[int, PreferenceBatch] = {}
    bad_rows: list[str] = []
    with raised_everywhere():
        # one by one, so that a pair's encoding does not depend on the rank's other pairs
        for place in range(rank(), wanted, world_size()):
            try:
                found[place] = read(place)
            except BadRowError as bad_row:
                bad_rows.append(str(bad_row.bad_row))
        if not found:  # more ranks than pairs: each rank needs a pair, and may repeat another rank's
            found = _first_readable(read, wanted)
    gathered = gather_objects(({place: int(pair.pair_ids) for place, pair in found.items()}, bad_rows))
    id_of_place = {place: pair_id for ids, _ in gathered for place, pair_id in ids.items()}
    all_bad_rows = [row for _, rows in gathered for row in rows]
    for row in all_bad_rows:
        say(f"held-out pair left out: {row}")
    _require_enough(len(id_of_place), all_bad_rows, available=available, max_bad_rows=max_bad_rows)
    places = sorted(id_of_place)
    position_of = {place: position for position, place in enumerate(places)}
    return HeldOutPairs(
        own=list(found.values()),
        positions=[position_of[place] for place in found],
        pair_ids=[id_of_place[place] for place in places],
    )


def _first_readable(read: Callable[[int], PreferenceBatch], num_places: int) -> dict[int, PreferenceBatch]:
    for place in range(num_places):
        with contextlib.suppress(BadRowError):  # the rank that has this pair reports it
            return {place: read(place)}
    return {}


def _require_enough(num_pairs: int, bad_rows: list[str], *, available: int, max_bad_rows: int) -> None:
    """Raise DataError if too few pairs can be read; all ranks have the same numbers and decide alike."""
    error = too_many_bad_rows(bad_rows, limit=max_bad_rows, what="held-out pairs")
    if error is None and num_pairs < 2:
        error = DataError(f"only {num_pairs} of {available} held-out pairs can be read; an interval needs at least 2")
    if error is not None:
        raise said_once(error)
