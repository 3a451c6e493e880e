"""Copies of a file with flipped bytes, or cut short, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def damaged(content: bytes, *, flips: int, cuts: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield what was done, and the damaged content: one to four changed bytes each, or a part from the start."""
    random = np.random.default_rng(seed)
    for _ in range(flips):
        changed = bytearray(content)
        places = random.integers(0, len(content), random.integers(1, 5))
        for place in places:
            changed[place] ^= int(random.integers(1, 256))
        yield f"bytes {sorted(map(int, places))} changed", bytes(changed)
    for length in random.integers(0, len(content), cuts):
        yield f"cut to {length} bytes", content[:length]
