"""The order of an epoch: every pair once, in an order that is a formula and must never change."""

import hashlib
import struct
from itertools import pairwise

import pytest

from ds_dpo.data.keyed_hash import id_of, keyed_hash
from ds_dpo.data.order import place_of, replacement_index


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


def test_keyed_hash_is_blake2b_of_the_name_and_little_endian_numbers():
    message = b"order\x00" + struct.pack("<q", 5) + struct.pack("<q", -1)
    expected = int(hashlib.blake2b(message, digest_size=16).digest()[::-1].hex(), 16)
    assert keyed_hash("order", 5, -1, bits=128) == expected
    assert keyed_hash("order", 5, -1) != keyed_hash("orders", 5, -1)
    assert id_of("row 1") == struct.unpack("<q", hashlib.blake2b(b"row 1", digest_size=8).digest())[0]
