"""The order of pairs as a formula: it gives the pair at any position of the run, stores nothing and skips nothing.

A position counts pairs since the start of the run; a step takes the next `pairs_per_step` of them. There is no gap
between epochs, so a batch may begin in one epoch and end in the next, and no pair is dropped.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ds_dpo.data.keyed_hash import keyed_hash

# 4 rounds make a Feistel network look random; we use 8, because the halves of a small dataset have few bits
FEISTEL_ROUNDS = 8


class PairOrder:
    """The order of pairs in buckets: all pairs of a step belong to the same bucket.

    Each bucket has its own endless stream, epoch after epoch, cut into batches of pairs_per_step. Pairs that do not
    fill a batch wait for the next epoch, and a bucket smaller than a batch gets a step when enough of its visits have
    come together. After e epochs of the whole dataset, a bucket of n pairs has had floor(e * n / pairs_per_step)
    batches. The steps of an epoch are in a pseudo-random order. With a single bucket, the order is that of place_of.
    """

    def __init__(self, bucket_sizes: Sequence[int], *, pairs_per_step: int, seed: int) -> None:
        """bucket_sizes: at least 1 each; the indices of bucket k begin at sum(bucket_sizes[:k])."""
        self._sizes = tuple(bucket_sizes)
        self._starts = (0, *accumulate(self._sizes))
        self._pairs_per_step = pairs_per_step
        self._seed = seed

    def place(self, position: int) -> tuple[int, int]:
        """Return (index, visit): the pair at a position, and how many epochs of its bucket came before, from 0."""
        bucket, batch = self._batch_of(position // self._pairs_per_step)
        own_position = batch * self._pairs_per_step + position % self._pairs_per_step
        index, visit = place_of(own_position, num_pairs=self._sizes[bucket], seed=self._seed, bucket=bucket)
        return self._starts[bucket] + index, visit

    def replacement(self, position: int, attempt: int) -> int:
        """Return the pair of the same bucket that replaces an unreadable one, after attempt - 1 unreadable others."""
        bucket, _ = self._batch_of(position // self._pairs_per_step)
        index = replacement_index(position, attempt, num_pairs=self._sizes[bucket], seed=self._seed)
        return self._starts[bucket] + index

    def visits_begun(self, num_steps: int) -> list[int]:
        """Return for each bucket the number of visits from which the first num_steps steps take at least one pair.

        With several buckets, the steps of the last epoch are examined one by one.
        """
        if len(self._sizes) == 1:
            batches = [num_steps]
        else:
            batches = self._batches_before(epoch := self._epoch_of(num_steps))
            for step in range(sum(self._batches_before(epoch)), num_steps):
                bucket, batch = self._batch_of(step)
                batches[bucket] = max(batches[bucket], batch + 1)
        pairs = [of_bucket * self._pairs_per_step for of_bucket in batches]
        return [-(-num // size) for num, size in zip(pairs, self._sizes, strict=True)]

    def _batch_of(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the number of the batch that it takes from this bucket."""
        if len(self._sizes) == 1:
            return 0, step
        epoch = self._epoch_of(step)
        begun, ended = self._batches_before(epoch), self._batches_before(epoch + 1)
        ends = list(accumulate(end - begin for begin, end in zip(begun, ended, strict=True)))
        turn = _permuted(step - sum(begun), num_values=ends[-1], name="steps", seed=self._seed, epoch=epoch)
        bucket = bisect_right(ends, turn)
        return bucket, ended[bucket] - (ends[bucket] - turn)

    def _batches_before(self, epoch: int) -> list[int]:
        return [epoch * size // self._pairs_per_step for size in self._sizes]

    def _epoch_of(self, step: int) -> int:
        """Return the epoch with sum(batches_before(epoch)) <= step < sum(batches_before(epoch + 1))."""
        # rounding down removes less than one batch per bucket, so the sum is at most epoch * pairs / pairs_per_step,
        # and above that minus the number of buckets
        pairs, buckets = self._starts[-1], len(self._sizes)
        first = step * self._pairs_per_step // pairs
        last = (step + buckets) * self._pairs_per_step // pairs
        epochs = range(first, last + 1)
        return first - 1 + bisect_right(epochs, step, key=lambda epoch: sum(self._batches_before(epoch)))


def place_of(position: int, *, num_pairs: int, seed: int, bucket: int = 0) -> tuple[int, int]:
    """Return (index, visit): the pair in [0, num_pairs) at a position, and the position's epoch, from 0.

    Each epoch has its own pseudo-random permutation, which is computed for this position only.
    """
    visit, turn = divmod(position, num_pairs)
    name = f"order of bucket {bucket}" if bucket else "order"
    return _permuted(turn, num_values=num_pairs, name=name, seed=seed, epoch=visit), visit


def replacement_index(position: int, attempt: int, *, num_pairs: int, seed: int) -> int:
    """Return the pair that replaces the pair at a position if it, and attempt - 1 replacements, cannot be read."""
    return keyed_hash("replacement", seed, position, attempt) % num_pairs


def _permuted(value: int, *, num_values: int, name: str, seed: int, epoch: int) -> int:
    """Return the place of a value under a pseudo-random permutation of [0, num_values).

    Uses a Feistel network over the next power of 4, applied until the result is in range. Source: Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002 (cycle-walking).
    """
    half_bits = ((num_values - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (keyed_hash(name, seed, epoch, round_number, right) & mask)
        value = left << half_bits | right
        # fewer than 4 turns on average, as 4**half_bits < 4 * num_values. It ends, because a permutation's cycle
        # returns.
        if value < num_values:
            return value
