"""A rank's thread that notices when micro-batches no longer end, and writes the stack of every thread to a file."""

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
NUM_REMEMBERED = 50
FIRST_STEP_FACTOR = 3  # the first step compiles and tunes kernels, and its update allocates the moments


class MicroBatchTimes:
    """Records how long micro-batches take, and says how long one may take.

    A step may have thousands of them, so its own length says nothing about a hang.
    """

    def __init__(self, *, factor: float, floor_seconds: float) -> None:
        self._factor, self._floor = factor, floor_seconds
        self._seconds: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self._first_step_has_ended = False

    def add(self, seconds: float) -> None:
        """Record a micro-batch. Those of the first step after a start are slower than others and are not counted."""
        if self._first_step_has_ended:
            self._seconds.append(seconds)

    def end_step(self) -> None:
        """Note that a whole step has ended, with its update."""
        self._first_step_has_ended = True

    @property
    def limit(self) -> float:
        """Seconds after which a micro-batch counts as a hang."""
        if not self._seconds:
            return FIRST_STEP_FACTOR * self._floor
        return max(self._floor, self._factor * statistics.median(self._seconds))


class HangWatch:
    """Watches on a thread from start() to close(). Time in which the process itself is stopped does not count."""

    def __init__(
        self, times: MicroBatchTimes, *, long_work_seconds: float, ends_seized: bool, on_hang: Callable[[str], None]
    ) -> None:
        """Prepare the watch without starting it.

        long_work_seconds: how long a pause may last. ends_seized: end the process, with status 1 and the stacks on
        standard error, if no Python thread runs for as long as a micro-batch may take: C code that hangs while it
        holds the interpreter's lock stops this thread too. on_hang: called once, on the thread, with what hangs.
        """
        self._times = times
        self._long_work_seconds = long_work_seconds
        self._ends_seized = ends_seized
        self._on_hang = on_hang
        self._pauses: list[str] = []
        self._waited = 0.0  # seconds awake since the last beat, or since the pause began
        self._last_beat: float | None = None
        self._paused_seconds = 0.0
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to wait for micro-batches."""
        self._last_beat = time.monotonic()
        self._put_off_end()
        threading.Thread(target=self._run, name="hang-watch", daemon=True).start()

    def close(self) -> None:
        """Stop waiting."""
        with self._lock:
            self._closed.set()
            if self._ends_seized:
                faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Note that a micro-batch has ended. The last one of a step ends with the update."""
        now = time.monotonic()
        if self._last_beat is not None:
            self._times.add(now - self._last_beat - self._paused_seconds)
        self._begin_anew(now)

    def end_step(self) -> None:
        """Note that a step and what follows it have ended, which is no micro-batch's time."""
        self._times.end_step()
        self._begin_anew(time.monotonic())

    def _begin_anew(self, now: float) -> None:
        self._last_beat, self._paused_seconds, self._waited = now, 0.0, 0.0

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Allow long work between steps, up to long_work_seconds. what: its name, such as "saving"."""
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
                # a C thread ends the process if this thread cannot run any more
                faulthandler.dump_traceback_later(self._times.limit, exit=True, file=2)

    def look(self, seconds: float) -> None:
        """Add seconds in which this process was awake."""
        self._waited += seconds

    @property
    def reason(self) -> str | None:
        """What hangs, or None."""
        if self._pauses:
            what, limit = self._pauses[-1], self._long_work_seconds
        else:
            what, limit = "a micro-batch", self._times.limit
        return f"{what} has taken more than {limit:.0f} s" if self._waited > limit else None


def write_stacks(path: Path, reason: str) -> None:
    """Append the stack of every thread to a file, or write it to standard error if the file cannot be written."""
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
