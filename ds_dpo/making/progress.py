"""Lines in the log that say how far a long task is."""

from __future__ import annotations

import time
from datetime import timedelta

from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.process.say import Say

SECONDS_BETWEEN_LINES = 15


class Progress:
    """Counts what this rank has done, and reports it every SECONDS_BETWEEN_LINES and at the end."""

    def __init__(self, verb: str, unit: str, *, total: int, say: Say) -> None:
        self.done = 0
        self._verb, self._unit, self._total, self._say = verb, unit, total, say
        self._start = self._last_line = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and self.done < self._total:
            return
        self._last_line = now
        rate = self.done / max(now - self._start, 1e-9)
        left = timedelta(seconds=round((self._total - self.done) / rate))
        of = f"{self._verb} {self.done} of {self._total} {self._unit} of this rank"
        self._say(f"{of}, {rate:,.1f} {self._unit}/s, {left} left")

    def say_sum(self) -> None:
        """Report what all ranks together have done; every rank calls it."""
        counts = gather_objects(self.done)
        self._say(f"{self._verb} {sum(counts)} {self._unit} in this run, on {len(counts)} ranks")
