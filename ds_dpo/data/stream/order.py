"""The order of pairs as a formula: which pair stands at a position of the run, with nothing stored and nothing to skip.

A position counts pairs since the start of the run; a step takes the next `pairs_per_step` of them. Epochs follow one
another without a gap, so a batch may begin in one and end in the next, and nothing is dropped.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ds_dpo.data.keyed_hash import keyed_hash

# 4 rounds make a Feistel network look random; twice as many, as the halves of a small dataset have few bits
FEISTEL_ROUNDS = 8


class PairOrder:
    """The order over buckets of pairs: all pairs of a step are of one bucket.

    Each bucket has an endless stream of its own, epoch after epoch, cut into batches of pairs_per_step: so what does
    not fill a batch waits for the next epoch, and a bucket smaller than a batch is met when enough of its visits have
    come together. After e epochs of the whole, a bucket of n pairs has had floor(e * n / pairs_per_step) batches. The
    steps of an epoch are in a pseudo-random order. With a single bucket that is place_of, whatever the step.
    """

    def __init__(self, bucket_sizes: Sequence[int], *, pairs_per_step: int, seed: int) -> None:
        """Keep the table of buckets; bucket k has the indices from sum(bucket_sizes[:k]) on, and none is empty."""
        self._sizes = tuple(bucket_sizes)
        self._starts = (0, *accumulate(self._sizes))
        self._pairs_per_step = pairs_per_step
        self._seed = seed

    def place(self, position: int) -> tuple[int, int]:
        """Return (index, visit): the pair at a position, and how often its bucket was gone through before, from 0."""
        bucket, batch = self._batch_of(position // self._pairs_per_step)
        own_position = batch * self._pairs_per_step + position % self._pairs_per_step
        index, visit = place_of(own_position, num_pairs=self._sizes[bucket], seed=self._seed, bucket=bucket)
        return self._starts[bucket] + index, visit

    def replacement(self, position: int, attempt: int) -> int:
        """Return the pair, of the same bucket, that stands in where attempt - 1 others before it cannot be read."""
        bucket, _ = self._batch_of(position // self._pairs_per_step)
        index = replacement_index(position, attempt, num_pairs=self._sizes[bucket], seed=self._seed)
        return self._starts[bucket] + index

    def visits_begun(self, num_steps: int) -> list[int]:
        """Return of how many visits, for each bucket, the first num_steps steps take at least one pair.

        With several buckets the steps of the last epoch are looked at one by one.
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
        """Return the bucket of a step, and which of that bucket's batches it takes."""
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
        # rounding down takes less than one batch from each bucket, so the sum is at most epoch * pairs / pairs_per_step
        # and less than the number of buckets below it
        pairs, buckets = self._starts[-1], len(self._sizes)
        first = step * self._pairs_per_step // pairs
        last = (step + buckets) * self._pairs_per_step // pairs
        epochs = range(first, last + 1)
        return first - 1 + bisect_right(epochs, step, key=lambda epoch: sum(self._batches_before(epoch)))


def place_of(position: int, *, num_pairs: int, seed: int, bucket: int = 0) -> tuple[int, int]:
    """Return (index, visit): the pair in [0, num_pairs) at a position, and the epoch, from 0, in which it stands there.

    Each epoch is a pseudo-random permutation of its own, computed for this one position.
    """
    visit, turn = divmod(position, num_pairs)
    name = f"order of bucket {bucket}" if bucket else "order"
    return _permuted(turn, num_values=num_pairs, name=name, seed=seed, epoch=visit), visit


def replacement_index(position: int, attempt: int, *, num_pairs: int, seed: int) -> int:
    """Return the pair that stands in at a position whose pair, and attempt - 1 stand-ins, cannot be read."""
    return keyed_hash("replacement", seed, position, attempt) % num_pairs


def _permuted(value: int, *, num_values: int, name: str, seed: int, epoch: int) -> int:
    """Return the place of a value under a pseudo-random permutation of [0, num_values).

    A Feistel network over the next power of 4, walked until it falls inside. Source: Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002 (cycle-walking).
    """
    half_bits = ((num_values - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (keyed_hash(name, seed, epoch, round_number, right) & mask)
        value = left << half_bits | right
        # fewer than 4 turns on average, as 4**half_bits < 4 * num_values; ends, as a permutation's cycle comes back
        if value < num_values:
            return value
