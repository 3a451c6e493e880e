"""Ask a run to stop: by a STOP file in its folder, a signal to any rank, or its launcher's lease."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = "stopped as asked before training began; the same command starts at the same step"
REPEAT_SECONDS = 2.0  # a signal to a whole job reaches a rank twice: from the sender and through the launcher


class StopRequest:
    """Remembers a request. The trainer reduces it over ranks once a step, so that all ranks stop at the same step.

    There is no collective inside a signal handler, because the other ranks would not be in it. A second signal ends the
    rank at once, even if the main thread waits in an endless collective and runs no Python handler; that is why a
    thread handles both signals.
    """

    def __init__(
        self,
        stop_file: Path,
        *,
        leave_at_once: Callable[[int], None],
        repeat_seconds: float = REPEAT_SECONDS,
    ) -> None:
        """leave_at_once: called on another thread with the number of a second signal."""
        self._stop_file, self._file_at_start = stop_file, _changed_at(stop_file)
        self._leave_at_once = leave_at_once
        self._repeat_seconds = repeat_seconds
        self._asked = False
        self._first_signal: float | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._before: dict[int, object] = {}

    def listen(self) -> None:
        """Take over the signals; call it on the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._ends = reader, writer
        # Python's C handler writes the signal's number there even if the main thread is blocked
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _do_nothing)
        threading.Thread(target=self._hear, args=(reader,), name="signals", daemon=True).start()
        _listening.append(self)

    def close(self) -> None:
        """Restore the earlier handlers; call it on the main thread."""
        if self._ends is None:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._ends[1].close()  # which ends the thread
        self._ends = None
        _listening.remove(self)

    def _hear(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self.take(number, time.monotonic())

    def take(self, number: int, now: float) -> None:
        """Record a signal. now: seconds of a monotonic clock."""
        self._asked = True
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > self._repeat_seconds:
            self._leave_at_once(number)

    def ask(self) -> None:
        """Request a stop from inside the process; any thread may call it."""
        self._asked = True

    def is_asked(self, *, look_for_file: bool) -> bool:
        """Return whether this rank was asked to stop. look_for_file: one rank is enough to look for the STOP file."""
        return self._asked or (look_for_file and self._stop_file.exists())

    def is_asked_since_start(self, *, look_for_file: bool) -> bool:
        """Return whether a request came since this process started.

        A STOP file that was there before does not count: a start that finds one trains a step and saves it first.
        """
        return self._asked or (look_for_file and _changed_at(self._stop_file) not in (None, self._file_at_start))

    def clear_file(self) -> None:
        """Remove the STOP file after the stop; otherwise the next start would stop at its first step."""
        self._stop_file.unlink(missing_ok=True)


def stop_command(run_folder: Path) -> str:
    """Return the command that asks the run in a folder to stop, quoted for a shell."""
    return shlex.join(["touch", str(run_folder / "STOP")])


def _changed_at(path: Path) -> int | None:
    """Return when a file was last changed, in nanoseconds; None without the file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


_listening: list[StopRequest] = []


def _do_nothing(number: int, frame: object) -> None:
    pass


def _leave_signals_to_parent() -> None:
    """Restore the handlers in a forked process, which shares the socket: its signals would count as the rank's."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _listening.clear()


os.register_at_fork(after_in_child=_leave_signals_to_parent)
