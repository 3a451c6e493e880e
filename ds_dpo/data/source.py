"""What a dataset is to the loader: a number of pairs, each read by its index. A new dataset is one such class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from ds_dpo.errors import DataError

# a file's bytes, the row of an `Image` column that is not decoded ({"bytes": ..., "path": ...}), or an open image
RawImage = bytes | Mapping[str, Any] | Image.Image


@dataclass(frozen=True, kw_only=True)
class PairRecord:
    """One pair as its dataset has it, images not yet decoded.

    pair_id: signed 64-bit, the same wherever the row lies. uid: how messages name the row.
    """

    prompt: str
    chosen: RawImage | None
    rejected: RawImage | None
    pair_id: int
    uid: str


class PairSource(Protocol):
    """Pairs by index, those that nobody won already left out."""

    @property
    def description(self) -> str:
        """One line for the log: what was opened, and how many pairs it has."""

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
