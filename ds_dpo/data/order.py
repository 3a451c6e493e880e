"""The order of pairs as a formula: which pair stands at a position of the run, with nothing stored and nothing to skip.

A position counts pairs since the start of the run. Epochs follow one another without a gap, so a batch may begin in
one and end in the next, and nothing is dropped.
"""

from __future__ import annotations

from ds_dpo.data.keyed_hash import keyed_hash

# 4 rounds make a Feistel network look random; twice as many, as the halves of a small dataset have few bits
FEISTEL_ROUNDS = 8


def place_of(position: int, *, num_pairs: int, seed: int) -> tuple[int, int]:
    """Return (index, visit): the pair in [0, num_pairs) at a position, and the epoch, from 0, in which it stands there.

    Each epoch is a pseudo-random permutation of its own, computed for this one position: a Feistel network over the
    next power of 4, walked until it falls inside. Source: Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002 (cycle-walking).
    """
    visit, index = divmod(position, num_pairs)
    half_bits = ((num_pairs - 1).bit_length() + 1) // 2
    while True:
        index = _permute(index, half_bits=half_bits, seed=seed, visit=visit)
        # fewer than 4 turns on average, as 4**half_bits < 4 * num_pairs; ends, as a permutation's cycle comes back
        if index < num_pairs:
            return index, visit


def _permute(value: int, *, half_bits: int, seed: int, visit: int) -> int:
    """Return the place of a value under a permutation of [0, 4**half_bits)."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_number in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (keyed_hash("order", seed, visit, round_number, right) & mask)
    return left << half_bits | right


def replacement_index(position: int, attempt: int, *, num_pairs: int, seed: int) -> int:
    """Return the pair that stands in at a position whose pair, and attempt - 1 stand-ins, cannot be read."""
    return keyed_hash("replacement", seed, position, attempt) % num_pairs
