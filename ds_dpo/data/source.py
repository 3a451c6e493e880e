"""What a dataset is to the loader: a number of pairs, each read by its index. A new dataset is one such class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.errors import DataError

# a file's bytes, the row of an `Image` column that is not decoded ({"bytes": ..., "path": ...}), or an open image
RawImage = bytes | Mapping[str, Any] | Image.Image


@dataclass(frozen=True, kw_only=True)
class PairRecord:
    """One pair as its dataset has it, images not yet decoded.

    pair_id: signed 64-bit, the same wherever the row lies. uid: how messages name the pair. target_probability: that
    the chosen image is the better one; 0.5 for a tie. weight: factor of the pair's loss. metadata: what else the row
    says, for people to read.
    """

    prompt: str
    chosen: RawImage | None
    rejected: RawImage | None
    pair_id: int
    uid: str
    target_probability: float = 1.0
    weight: float = 1.0
    metadata: Mapping[str, Any] = field(default_factory=dict)


class PairSource(Protocol):
    """Pairs by index, those that filters leave out already gone; the same for every process that opens it.

    Pairs of one aspect bucket have neighbouring indices: bucket k those from sum(bucket_sizes[:k]) on.
    """

    @property
    def description(self) -> str:
        """For the log: what was opened, how many rows, what was left out for which reason, how many pairs."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Numbers by name: rows, pairs, ties, prompts (distinct, of the pairs), and dropped_* for each filter."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What makes these pairs these pairs, by the name of each part: two sources that agree in it are the same."""

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of pairs in each bucket, none of them 0; a single one where there are no buckets."""

    @property
    def bucket_shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width in pixels of each bucket's training images."""

    def file_order(self) -> NDArray[np.int64]:
        """Return all indices in the order in which the pairs lie in the dataset's files."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> PairRecord:
        """Return a pair. Raises BadRowError where the row has no usable content."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that could not be read and was replaced."""

    uid: str
    reason: str

    def __str__(self) -> str:
        return f"{self.uid}: {self.reason}"


class BadRowError(DataError):
    """A row that cannot be read, while others may be."""

    def __init__(self, uid: str, reason: str) -> None:
        super().__init__(f"{uid}: {reason}")
        self.bad_row = BadRow(uid=uid, reason=reason)
