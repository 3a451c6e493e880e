"""A rank's micro-batches: samples from the loader, encoded, with the time that they kept the step waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ds_dpo.batch import PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """samples: of the loader, without end. bad_rows: the rows that this rank could not read so far."""

    samples: Iterator[Any]
    encode: Callable[[Any], PreferenceBatch]
    bad_rows: Callable[[], Sequence[object]]

    def take(self) -> tuple[PreferenceBatch, float]:
        """Return the next micro-batch, and for how many seconds the loader let this rank wait."""
        start = time.perf_counter()
        samples = next(self.samples)
        waited_seconds = time.perf_counter() - start
        return self.encode(samples), waited_seconds
