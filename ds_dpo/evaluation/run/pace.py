"""Lines now and then that say how far a long part is, for a person who waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from ds_dpo.process.say import Say

SECONDS_BETWEEN_LINES = 30.0


class Pace:
    """Counts what this rank has done, and says so every SECONDS_BETWEEN_LINES; a short part says nothing."""

    def __init__(self, what: str, *, total: int, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._say, self._clock = what, total, say, clock
        self._done = 0
        self._start = self._last = clock()

    def add(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if now - self._last < SECONDS_BETWEEN_LINES or self._done == self._total:
            return
        self._last = now
        rate = self._done / (now - self._start)
        left = timedelta(seconds=round((self._total - self._done) / rate))
        self._say(f"{self._what} {self._done} of this rank's {self._total} images, {rate:.3g}/s, {left} left")
