"""What a kind of file is for tests/fuzz.py: whole files to damage, and the reader that meets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prepared:
    """paths: the files to damage. read: reads them as a program does. Raises DsDpoError."""

    paths: Sequence[Path]
    read: Callable[[], Any]


# an empty folder -> a kind's files in it
Prepare = Callable[[Path], Prepared]


def silent(*_: Any) -> None:
    """Say nothing."""
