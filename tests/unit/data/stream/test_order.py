"""The order of an epoch: every pair once, in an order that is a formula and must never change."""

import hashlib
import struct
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest

from ds_dpo.data.keyed_hash import id_of, keyed_hash
from ds_dpo.data.stream.order import PairOrder, place_of, replacement_index


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 4, 5, 16, 17, 64, 65, 97, 1000])
def test_each_epoch_has_every_pair_once(num_pairs):
    for epoch in range(3):
        positions = range(epoch * num_pairs, (epoch + 1) * num_pairs)
        places = [place_of(position, num_pairs=num_pairs, seed=3) for position in positions]
        assert sorted(index for index, _ in places) == list(range(num_pairs))
        assert {visit for _, visit in places} == {epoch}


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(epoch, seed):
        return [place_of(position, num_pairs=50, seed=seed)[0] for position in range(50 * epoch, 50 * epoch + 50)]

    orders = [order(0, 0), order(1, 0), order(0, 1), order(1, 1), order(0, 2**63 - 1)]
    assert len({tuple(each) for each in orders}) == len(orders)
    assert list(range(50)) not in orders


def test_golden_order():
    """A run that resumes under another formula would see pairs twice: these numbers may not change."""
    first_epochs = [place_of(position, num_pairs=10, seed=0)[0] for position in range(20)]
    assert first_epochs == [3, 5, 2, 6, 4, 7, 8, 9, 0, 1, 2, 0, 5, 6, 1, 3, 9, 8, 4, 7]
    assert [place_of(position, num_pairs=851293, seed=7) for position in (0, 1, 851292, 851293)] == [
        (562619, 0),
        (395001, 0),
        (229260, 0),
        (674355, 1),
    ]


def test_a_billion_pairs_cost_no_more_than_ten():
    assert place_of(10**12 + 5, num_pairs=10**9, seed=0) == (8366077, 1000)


def test_places_are_uniform_over_epochs():
    """Chi-squared of where pair 0..5 stand in 3000 epochs; 25 degrees of freedom, so 52.6 is exceeded once in 1000."""
    counts = [[0] * 6 for _ in range(6)]
    for position in range(6 * 3000):
        index, _ = place_of(position, num_pairs=6, seed=1)
        counts[position % 6][index] += 1
    assert sum((count - 500) ** 2 / 500 for line in counts for count in line) < 52.6


def test_neighbours_are_as_likely_as_any_two_pairs():
    """In a random order of 200, successive indices differ by 1 in 2/200 of the 199 steps: 1.99 times, std near 1.4."""
    places = [place_of(position, num_pairs=200, seed=5)[0] for position in range(200 * 20)]
    adjacent = sum(abs(a - b) == 1 for a, b in pairwise(places))
    assert 20 < adjacent < 60


def test_replacements_are_a_formula_of_seed_position_and_attempt():
    drawn = [replacement_index(9, attempt, num_pairs=1000, seed=0) for attempt in (1, 2, 3)]
    assert drawn == [894, 64, 649]
    assert replacement_index(9, 1, num_pairs=1000, seed=1) != drawn[0]
    assert replacement_index(10, 1, num_pairs=1000, seed=0) != drawn[0]
    assert replacement_index(10**12, 20, num_pairs=1, seed=0) == 0


# ---- buckets ----

# sizes of buckets, and pairs of a step: more and fewer than those of a bucket and of all, and dividing neither
TABLES = [
    ([13, 3, 7], 8),
    ([1, 1, 1], 4),
    ([1, 100], 7),
    ([5, 2], 1),
    ([2, 3, 5, 7, 11, 13], 64),
    ([16, 8, 24], 8),
]


def steps_before(epoch, sizes, pairs_per_step):
    """How many steps of each bucket the epochs before have."""
    return [floor(Fraction(epoch * size, pairs_per_step)) for size in sizes]


def bucket_of(index, sizes):
    return next(bucket for bucket in range(len(sizes)) if index < sum(sizes[: bucket + 1]))


def steps_of(sizes, pairs_per_step, num_steps, *, seed=0):
    """The places of each step."""
    order = PairOrder(sizes, pairs_per_step=pairs_per_step, seed=seed)
    starts = range(0, num_steps * pairs_per_step, pairs_per_step)
    return [[order.place(position) for position in range(start, start + pairs_per_step)] for start in starts]


@pytest.mark.parametrize(("sizes", "pairs_per_step"), TABLES)
def test_all_pairs_of_a_step_are_of_one_bucket(sizes, pairs_per_step):
    for step in steps_of(sizes, pairs_per_step, 60):
        assert len({bucket_of(index, sizes) for index, _ in step}) == 1


@pytest.mark.parametrize(("sizes", "pairs_per_step"), TABLES)
def test_each_bucket_has_had_its_share_after_each_epoch(sizes, pairs_per_step):
    """A bucket's pairs are met visit by visit, each once a visit; only what fills no step yet is left to later."""
    num_epochs = 150
    shares = [steps_before(epoch, sizes, pairs_per_step) for epoch in range(num_epochs + 1)]
    steps = steps_of(sizes, pairs_per_step, sum(shares[num_epochs]))
    for epoch in range(num_epochs + 1):
        done = Counter(bucket_of(step[0][0], sizes) for step in steps[: sum(shares[epoch])])
        assert [done[bucket] for bucket in range(len(sizes))] == shares[epoch]
    assert min(shares[num_epochs]) > 0
    for epoch in (1, 2, 50, num_epochs):
        places = [place for step in steps[: sum(shares[epoch])] for place in step]
        assert len(set(places)) == len(places)
        for bucket, size in enumerate(sizes):
            indices = range(sum(sizes[:bucket]), sum(sizes[: bucket + 1]))
            times = Counter(index for index, _ in places if index in indices)
            whole_visits, rest = divmod(shares[epoch][bucket] * pairs_per_step, size)
            assert (
                sorted(times[index] for index in indices) == [whole_visits] * (size - rest) + [whole_visits + 1] * rest
            )
            visits = Counter(visit for index, visit in places if index in indices)
            expected = dict.fromkeys(range(whole_visits), size) | ({whole_visits: rest} if rest else {})
            assert visits == expected


def test_steps_of_an_epoch_are_mixed_anew_in_each():
    sizes, pairs_per_step = [80, 80, 80], 8  # 10 steps of each bucket in each epoch

    def buckets(epoch, seed):
        steps = steps_of(sizes, pairs_per_step, 30 * (epoch + 1), seed=seed)[30 * epoch :]
        return tuple(bucket_of(step[0][0], sizes) for step in steps)

    orders = [buckets(0, 0), buckets(1, 0), buckets(2, 0), buckets(0, 1)]
    assert len(set(orders)) == 4
    for order in orders:
        assert Counter(order) == {0: 10, 1: 10, 2: 10}
        # in a random order, successive buckets differ in 20 of 29 cases on average, with a deviation of 2.5
        assert 12 < sum(a != b for a, b in pairwise(order)) < 28


def test_pairs_of_buckets_of_one_size_are_not_in_the_same_order():
    # two steps of each epoch, one of each bucket
    steps = {bucket_of(step[0][0], [50, 50]): step for step in steps_of([50, 50], 50, 2)}
    assert [index for index, _ in steps[0]] != [index - 50 for index, _ in steps[1]]


def test_a_single_bucket_has_the_plain_order_whatever_the_step():
    for pairs_per_step in (1, 8, 100):
        order = PairOrder([23], pairs_per_step=pairs_per_step, seed=5)
        for position in (*range(50), 10**9):
            assert order.place(position) == place_of(position, num_pairs=23, seed=5)
            assert order.replacement(position, 2) == replacement_index(position, 2, num_pairs=23, seed=5)


def test_a_replacement_is_of_the_bucket_of_its_step():
    order = PairOrder([13, 3, 7], pairs_per_step=8, seed=3)
    for position in range(8 * 30):
        bucket = bucket_of(order.place(position)[0], [13, 3, 7])
        for attempt in (1, 2, 3):
            index = order.replacement(position, attempt)
            assert bucket_of(index, [13, 3, 7]) == bucket
            expected = replacement_index(position, attempt, num_pairs=[13, 3, 7][bucket], seed=3)
            assert index == expected + [0, 13, 16][bucket]


def test_golden_order_over_buckets():
    """As in test_golden_order: these numbers may not change."""
    order = PairOrder([13, 3, 7], pairs_per_step=8, seed=0)
    places = [order.place(position) for position in (0, 7, 8, 16, 63, 10**9)]
    assert places == [(3, 0), (9, 0), (11, 0), (21, 0), (1, 3), (19, 43478260)]


def test_a_billion_pairs_in_buckets_cost_no_more_than_ten():
    sizes = [10**9 // 9 + number for number in range(9)]
    order = PairOrder(sizes, pairs_per_step=2048, seed=0)
    for position in (10**12 // 2048 * 2048, 10**18 // 2048 * 2048):
        step = [order.place(position + offset) for offset in range(64)]
        (bucket,) = {bucket_of(index, sizes) for index, _ in step}
        # each bucket is as far as the whole, to a step
        expected_visits = position / sum(sizes)
        assert all(abs(visit - expected_visits) <= 1 for _, visit in step)
        assert len({index for index, _ in step}) == 64
        assert order.replacement(position, 1) in range(sum(sizes[:bucket]), sum(sizes[: bucket + 1]))


def test_keyed_hash_is_blake2b_of_the_name_and_little_endian_numbers():
    message = b"order\x00" + struct.pack("<q", 5) + struct.pack("<q", -1)
    expected = int(hashlib.blake2b(message, digest_size=16).digest()[::-1].hex(), 16)
    assert keyed_hash("order", 5, -1, bits=128) == expected
    assert keyed_hash("order", 5, -1) != keyed_hash("orders", 5, -1)
    assert id_of("row 1") == struct.unpack("<q", hashlib.blake2b(b"row 1", digest_size=8).digest())[0]
