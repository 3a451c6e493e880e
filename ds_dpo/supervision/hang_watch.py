"""A rank's thread that notices when no step ends any more, and writes down where every thread stands."""

from __future__ import annotations

import faulthandler
import platform
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ds_dpo.process.departure import say

LOOK_SECONDS = 1.0
NUM_STEPS_REMEMBERED = 50
FIRST_STEP_FACTOR = 3  # kernels are compiled and tuned in it


class StepTimes:
    """How long steps take, and how long one may."""

    def __init__(self, *, factor: float, floor_seconds: float) -> None:
        self._factor, self._floor = factor, floor_seconds
        self._seconds: deque[float] = deque(maxlen=NUM_STEPS_REMEMBERED)
        self._has_begun = False

    def add(self, seconds: float) -> None:
        """Take in a step; the first one of a start is no measure of the others."""
        if self._has_begun:
            self._seconds.append(seconds)
        self._has_begun = True

    @property
    def limit(self) -> float:
        """Seconds after which a step hangs."""
        if not self._seconds:
            return FIRST_STEP_FACTOR * self._floor
        return max(self._floor, self._factor * statistics.median(self._seconds))


class HangWatch:
    """The thread, from start() to close(); time for which the process itself is stopped does not count."""

    def __init__(
        self, times: StepTimes, *, long_work_seconds: float, ends_seized: bool, on_hang: Callable[[str], None]
    ) -> None:
        """Watch nothing yet.

        long_work_seconds: how long a pause may last. ends_seized: whether to end, with status 1 and the stacks on
        standard error, a process in which no thread of Python's runs for as long as a step may take: code in C may hold
        the interpreter's lock and hang, which this thread cannot see. on_hang: is told what hangs, once, on the thread.
        """
        self._times = times
        self._long_work_seconds = long_work_seconds
        self._ends_seized = ends_seized
        self._on_hang = on_hang
        self._pauses: list[str] = []
        self._waited = 0.0  # seconds of being awake since the last beat, or since the pause began
        self._last_beat: float | None = None
        self._paused_seconds = 0.0
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to wait for a step."""
        self._last_beat = time.monotonic()
        self._put_off_end()
        threading.Thread(target=self._run, name="hang-watch", daemon=True).start()

    def close(self) -> None:
        """Wait for no more steps."""
        with self._lock:
            self._closed.set()
            if self._ends_seized:
                faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._last_beat is not None:
            self._times.add(now - self._last_beat - self._paused_seconds)
        self._last_beat, self._paused_seconds, self._waited = now, 0.0, 0.0

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Do something that takes as long as it takes, beside steps; what: such as "saving"."""
        begin = time.monotonic()
        self._pauses.append(what)
        self._waited = 0.0
        try:
            yield
        finally:
            self._pauses.pop()
            self._paused_seconds += 0.0 if self._pauses else time.monotonic() - begin
            self._waited = 0.0

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(LOOK_SECONDS):
            self._put_off_end()
            now = time.monotonic()
            self.look(min(now - last, 2 * LOOK_SECONDS))
            last = now
            if self.reason is not None:
                self._on_hang(self.reason)
                return

    def _put_off_end(self) -> None:
        with self._lock:
            if self._ends_seized and not self._closed.is_set():
                # a thread of C's ends the process where this one does not come along any more
                faulthandler.dump_traceback_later(self._times.limit, exit=True, file=2)

    def look(self, seconds: float) -> None:
        """Count time for which this process was awake."""
        self._waited += seconds

    @property
    def reason(self) -> str | None:
        """What hangs, None while nothing does."""
        if self._pauses:
            what, limit = self._pauses[-1], self._long_work_seconds
        else:
            what, limit = "a step", self._times.limit
        return f"{what} has taken more than {limit:.0f} s" if self._waited > limit else None


def write_stacks(path: Path, reason: str) -> None:
    """Append where every thread of this process stands; on standard error where the file cannot be written."""
    head = f"{datetime.now().astimezone().isoformat(timespec='seconds')} on {platform.node()}: {reason}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(head)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}): {head}")
        faulthandler.dump_traceback(2, all_threads=True)
