"""How far a run is, in words: step, epoch, and the time that is left by the median of its steps."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

NUM_STEPS_REMEMBERED = 50


class Pace:
    """Remembers how long the last steps of a start took."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=NUM_STEPS_REMEMBERED)
        self._has_begun = False

    def add(self, seconds: float) -> None:
        """Record a step. The first one of a start does not count, because it compiles and tunes kernels."""
        if self._has_begun:
            self._seconds.append(seconds)
        self._has_begun = True

    def seconds_left(self, steps: int) -> float | None:
        """Return the median of the last steps times the steps that are left; None before the second step."""
        return statistics.median(self._seconds) * steps if self._seconds else None


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is. num_pairs: pairs of an epoch, None if not known."""

    max_train_steps: int
    num_pairs: int | None = None


def progress_text(length: Length, *, step: int, pairs_seen: int | None, seconds_left: float | None) -> str:
    """Return "step  120/2000  epoch 0.42  eta 3 h 12 min", without what is not known; no eta after the last step."""
    width = len(str(length.max_train_steps))
    parts = [f"step {step:>{width}}/{length.max_train_steps}"]
    if length.num_pairs and pairs_seen is not None:
        parts.append(f"epoch {pairs_seen / length.num_pairs:.2f}")
    if seconds_left is not None and step < length.max_train_steps:
        parts.append(f"eta {duration_text(seconds_left)}")
    return "  ".join(parts)


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units: 45 s, 12 min, 3 h 12 min, 2 d 5 h."""
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
