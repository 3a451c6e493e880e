"""Running counts of pairs: memory grows with distinct values, and by some bytes of digests for each pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_dpo.data.source import BadRow, PairRecord
from ds_dpo.data.statistics.duplicates import DIGEST_TYPE
from ds_dpo.data.statistics.image_facts import ImageFacts, digest_of

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
CLIP_TOKENS = 75  # read of a prompt by CLIP, without the start and end tokens
SIDE_OF_LABEL = {1.0: "first", 0.0: "second"}

Quantiles = dict[str, float]


class DigestList:
    """A list of digests, stored as bytes without Python objects."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def append(self, digest: bytes) -> None:
        """Add a digest."""
        self._bytes += digest

    def __len__(self) -> int:
        return len(self._bytes) // DIGEST_TYPE.itemsize

    def array(self) -> NDArray[np.bytes_]:
        """Return all digests as an array; none can be added while the array exists."""
        return np.frombuffer(self._bytes, DIGEST_TYPE)


@dataclass(kw_only=True)
class Tally:
    """Counts of the pairs so far. Fields from `chosen` on count only pairs whose images were decoded and are usable."""

    prompts: DigestList = field(default_factory=DigestList)
    characters: Counter[int] = field(default_factory=Counter)
    empty_prompts: int = 0
    long_prompts: int = 0
    targets: Counter[float] = field(default_factory=Counter)
    weights: Counter[float] = field(default_factory=Counter)
    label_winners: Counter[str] = field(default_factory=Counter)
    bad_pairs: list[BadRow] = field(default_factory=list)

    chosen: DigestList = field(default_factory=DigestList)
    rejected: DigestList = field(default_factory=DigestList)
    places: bytearray = field(default_factory=bytearray)  # place of the pair among all prompts, int64
    winners: bytearray = field(default_factory=bytearray)  # from winner_of, int8
    indices: bytearray = field(default_factory=bytearray)  # index of the pair in its source, int64
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    pairs_of_two_sizes: int = 0
    enlarged_images: int = 0

    def add_pair(self, record: PairRecord) -> int:
        """Count a row without its images, and return its place among all prompts."""
        self.prompts.append(digest_of(record.prompt.encode("utf-8", "surrogatepass")))
        self.characters[len(record.prompt)] += 1
        self.empty_prompts += not record.prompt.strip()
        self.long_prompts += len(record.prompt.split()) > CLIP_TOKENS
        self.targets[_rounded(record.target_probability)] += 1
        self.weights[_rounded(record.weight)] += 1
        if "label" in record.metadata:
            self.label_winners[SIDE_OF_LABEL.get(record.metadata["label"], "neither")] += 1
        return len(self.prompts) - 1

    def add_images(self, place: int, index: int, record: PairRecord, chosen: ImageFacts, rejected: ImageFacts) -> None:
        """Count a pair's images. place: the value that add_pair returned. index: of the pair in its source."""
        self.places += np.int64(place).tobytes()
        self.chosen.append(chosen.digest)
        self.rejected.append(rejected.digest)
        self.winners += winner_of(record).to_bytes(1, signed=True)
        self.indices += np.int64(index).tobytes()
        self.pairs_of_two_sizes += chosen.size != rejected.size
        for facts in (chosen, rejected):
            self.sizes[facts.size] += 1
            self.formats[facts.format] += 1
            self.modes[facts.mode] += 1
            self.enlarged_images += facts.scale > 1


def winner_of(record: PairRecord) -> int:
    """Return 1 if the chosen image is the better one, 0 for a tie, and -1 if the target says that it lost."""
    return (record.target_probability > 0.5) - (record.target_probability < 0.5)


def quantiles(counts: Mapping[Any, int]) -> Quantiles:
    """Return, for each share in QUANTILES, the smallest value that this share of the values does not exceed.

    Returns {} if there are no values.
    """
    values = sorted(counts)
    ends = list(accumulate(counts[value] for value in values))
    found = {}
    for name, share in QUANTILES.items() if values else ():
        rank = max(1, math.ceil(share * ends[-1]))
        found[name] = values[int(np.searchsorted(ends, rank))]
    return found


def quantiles_of(numbers: NDArray[np.int64]) -> Quantiles:
    """Return the quantiles of numbers."""
    values, counts = np.unique(numbers, return_counts=True)
    return quantiles(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _rounded(number: float) -> float:
    """Round a number to three digits, so that continuous numbers have few distinct values."""
    return float(f"{number:.3g}")
