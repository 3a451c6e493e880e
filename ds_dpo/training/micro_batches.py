"""A rank's micro-batches: encoded samples of the loader, and the time that the rank waited for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ds_dpo.batch import PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """samples: those of the loader, endless. bad_rows: returns the rows that this rank could not read so far."""

    samples: Iterator[Any]
    encode: Callable[[Any], PreferenceBatch]
    bad_rows: Callable[[], Sequence[object]]

    def take(self) -> tuple[PreferenceBatch, float]:
        """Return the next micro-batch, and the seconds that this rank waited for the loader."""
        start = time.perf_counter()
        samples = next(self.samples)
        waited_seconds = time.perf_counter() - start
        return self.encode(samples), waited_seconds
