"""The interface of a dataset: pairs that are read by index. A new dataset is one class with these methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.errors import DataError

# a file's bytes, a row of an undecoded `Image` column ({"bytes": ..., "path": ...}), or an open image
RawImage = bytes | Mapping[str, Any] | Image.Image


@dataclass(frozen=True, kw_only=True)
class PairRecord:
    """One pair of a dataset, with images that are not decoded yet.

    pair_id: signed 64-bit; does not depend on where the row is stored. uid: names the pair in messages.
    target_probability: probability that the chosen image is the better one; 0.5 for a tie. weight: factor of the pair's
    loss. image_numbers: of the chosen and the rejected image in the row. metadata: other values of the row, for people
    to read.
    """

    prompt: str
    chosen: RawImage | None
    rejected: RawImage | None
    pair_id: int
    uid: str
    target_probability: float = 1.0
    weight: float = 1.0
    image_numbers: tuple[int, int] = (0, 1)
    metadata: Mapping[str, Any] = field(default_factory=dict)


class PairSource(Protocol):
    """Pairs by index, after all filters; the same in every process that opens the source.

    The pairs of an aspect bucket have consecutive indices: those of bucket k begin at sum(bucket_sizes[:k]).
    """

    @property
    def description(self) -> str:
        """For the log: what was opened, the number of rows, how many each filter left out, the number of pairs."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts by name: rows, pairs, ties, prompts (distinct ones of the pairs), and dropped_* for each filter."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Identifies the pairs, in named parts: two sources with the same fingerprint hold the same pairs."""

    @property
    def commit(self) -> str | None:
        """Commit of a data set of the hub, None for any other."""

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of pairs in each bucket, at least 1; a single number if there are no buckets."""

    @property
    def bucket_shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width in pixels of each bucket's training images."""

    def file_order(self) -> NDArray[np.int64]:
        """Return all indices in the order of the pairs in the dataset's files."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> PairRecord:
        """Return a pair. Raises BadRowError if the row has no usable content."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that could not be read and was replaced."""

    uid: str
    reason: str

    def __str__(self) -> str:
        return f"{self.uid}: {self.reason}"


class BadRowError(DataError):
    """A row that cannot be read, although other rows may be readable."""

    def __init__(self, uid: str, reason: str) -> None:
        super().__init__(f"{uid}: {reason}")
        self.bad_row = BadRow(uid=uid, reason=reason)
