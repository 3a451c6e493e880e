"""How a run is asked to stop: a STOP file in its folder, a signal on any one rank, or its launcher's lease."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 2.0  # a signal to a whole job reaches a rank twice: from the sender and through the launcher


class StopRequest:
    """Remembers a request; the trainer reduces it over ranks once a step, so that all stop at the same one.

    A collective inside a signal handler would meet other ranks at another place. A second signal leaves at once; it
    must do so also where the main thread waits in a collective for ever and runs no handler of Python's, so both are
    taken in by a thread.
    """

    def __init__(
        self,
        stop_file: Path,
        *,
        leave_at_once: Callable[[int], None],
        repeat_seconds: float = REPEAT_SECONDS,
    ) -> None:
        """leave_at_once: is called on another thread with the number of a second signal."""
        self._stop_file = stop_file
        self._leave_at_once = leave_at_once
        self._repeat_seconds = repeat_seconds
        self._asked = False
        self._first_signal: float | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._before: dict[int, object] = {}

    def listen(self) -> None:
        """Take over the signals; from the main thread."""
        heard, told = socket.socketpair()
        told.setblocking(False)
        self._ends = heard, told
        # Python's own handler in C writes the number there, whatever the main thread does
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _do_nothing)
        threading.Thread(target=self._hear, args=(heard,), name="signals", daemon=True).start()
        _listening.append(self)

    def close(self) -> None:
        """Give the signals back; from the main thread."""
        if self._ends is None:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._ends[1].close()  # which ends the thread
        self._ends = None
        _listening.remove(self)

    def _hear(self, heard: socket.socket) -> None:
        with heard:
            while numbers := heard.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self.take(number, time.monotonic())

    def take(self, number: int, now: float) -> None:
        """Take in a signal. now: in seconds, of any clock that only goes forward."""
        self._asked = True
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > self._repeat_seconds:
            self._leave_at_once(number)

    def ask(self) -> None:
        """Ask from within; from any thread."""
        self._asked = True

    def is_asked(self, *, look_for_file: bool) -> bool:
        """True once this rank was asked; only one rank needs to look for the file."""
        return self._asked or (look_for_file and self._stop_file.exists())

    def clear_file(self) -> None:
        """Remove the STOP file once it was followed, or the next start would stop at its first step."""
        self._stop_file.unlink(missing_ok=True)


_listening: list[StopRequest] = []


def _do_nothing(number: int, frame: object) -> None:
    pass


def _leave_signals_to_parent() -> None:
    """A forked process shares the socket: what is sent to it would look as if it were sent to the rank."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _listening.clear()


os.register_at_fork(after_in_child=_leave_signals_to_parent)
