"""The pair visits whose reference errors are computed, in an order that is cut into units and batches by number.

A pair visit is a pair in one epoch. A batch is the same on whichever rank it is computed, so the result does not depend
on the number of ranks, to the bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.loader import PairReader, ReadPair, read_position
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.reference.cache.record import Coverage


class Places(Protocol):
    """Numbered places, each of which holds a pair visit."""

    def __len__(self) -> int: ...

    def group_end(self, place: int) -> int:
        """Return the first place after this one whose pair may be in another bucket."""

    def read(self, pairs: PairReader[Any], place: int) -> ReadPair[Any]:
        """Return the pair at a place. Raises DataError if a run would end there."""


@dataclass(frozen=True, kw_only=True)
class RunPlaces:
    """The positions of a run, read as its loader reads them: a bad pair is replaced in the same way."""

    order: PairOrder
    num_positions: int
    pairs_per_step: int
    has_buckets: bool

    def __len__(self) -> int:
        return self.num_positions

    def group_end(self, place: int) -> int:
        """Return the end of the step if there are buckets, else the end of all places."""
        if not self.has_buckets:
            return self.num_positions
        return (place // self.pairs_per_step + 1) * self.pairs_per_step

    def read(self, pairs: PairReader[Any], place: int) -> ReadPair[Any]:
        """Return the pair at a position, or the pair that replaces it."""
        return read_position(pairs, self.order, place)


@dataclass(frozen=True, kw_only=True)
class WholeVisits:
    """All pairs of the first visits, one visit after another. A bad pair is not replaced, as all others are there."""

    bucket_sizes: tuple[int, ...]
    visits: int

    @property
    def num_pairs(self) -> int:
        return sum(self.bucket_sizes)

    def __len__(self) -> int:
        return self.visits * self.num_pairs

    def group_end(self, place: int) -> int:
        """Return the end of the bucket."""
        visit, index = divmod(place, self.num_pairs)
        ends = list(accumulate(self.bucket_sizes))
        return visit * self.num_pairs + ends[bisect_right(ends, index)]

    def read(self, pairs: PairReader[Any], place: int) -> ReadPair[Any]:
        """Return the pair at a place, or that it is bad."""
        visit, index = divmod(place, self.num_pairs)
        try:
            return ReadPair(sample=pairs.read(index, visit), index=index, visit=visit, bad=[])
        except BadRowError as error:
            return ReadPair(sample=None, index=index, visit=visit, bad=[(index, error.bad_row)])


def places_of(coverage: Coverage, *, bucket_sizes: tuple[int, ...], seed: int) -> Places:
    """Return the places of a coverage."""
    if not coverage.num_positions:
        return WholeVisits(bucket_sizes=bucket_sizes, visits=coverage.whole_visits)
    return RunPlaces(
        order=PairOrder(bucket_sizes, pairs_per_step=coverage.pairs_per_step, seed=seed),
        num_positions=coverage.num_positions,
        pairs_per_step=coverage.pairs_per_step,
        has_buckets=len(bucket_sizes) > 1,
    )


def batches_of(places: Places, unit: range, *, batch_pairs: int) -> Iterator[range]:
    """Yield the batches of a unit's places: up to batch_pairs consecutive places of one bucket."""
    start = unit.start
    while start < unit.stop:
        end = min(start + batch_pairs, places.group_end(start), unit.stop)
        yield range(start, end)
        start = end
