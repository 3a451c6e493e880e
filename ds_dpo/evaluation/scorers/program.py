"""A program that runs beside this one: lines in, lines out, no wait without an end, and nothing left of it."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

MAX_LINE_BYTES = 2**20
KEPT_ERROR_LINES = 20
SECONDS_TO_END = 5.0


class ProgramEndedError(Exception):
    """It has ended; the message says how, as the end of a sentence."""


class ProgramSilentError(Exception):
    """It has not written a line within the time."""


class Program:
    """A started program. Threads write to it and read from it, so that no full pipe can block both sides."""

    def __init__(self, words: Sequence[str], *, environment: Mapping[str, str]) -> None:
        """Start it. Raises OSError."""
        self.title = " ".join(words)
        self._process = subprocess.Popen(
            list(words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,  # a shell script's children end with it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._is_stopped = False
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._unsent: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: deque[bytes] = deque(maxlen=KEPT_ERROR_LINES)
        self._threads = [
            _started(_read_lines, self._process.stdout, self._lines.put),
            _started(_read_lines, self._process.stderr, self._note_error),
        ]
        _started(_write, self._process.stdin, self._unsent)

    def write(self, text: str) -> None:
        """Send text; this returns at once, also if the program does not read."""
        self._unsent.put(text)

    def read_line(self, *, timeout_seconds: float) -> bytes:
        """Return the next line. Raises ProgramSilentError and ProgramEndedError."""
        try:
            line = self._lines.get(timeout=timeout_seconds)
        except queue.Empty:
            raise ProgramSilentError from None
        if line is None:
            self._lines.put(None)  # it has ended for the next reader too
            raise ProgramEndedError(self._how_it_ended())
        if len(line) > MAX_LINE_BYTES:
            raise ProgramEndedError(f"wrote a line of more than {MAX_LINE_BYTES} bytes")
        return line

    def last_words(self) -> str:
        """Return the last lines of its standard error."""
        self._threads[1].join(timeout=SECONDS_TO_END)
        return b" ".join(line.strip() for line in list(self._errors)).decode(errors="replace").strip()

    def stop(self) -> None:
        """End the program: it gets the end of its input, then SIGTERM, then SIGKILL."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._unsent.put(None)
        for after in (signal.SIGTERM, signal.SIGKILL, None):
            try:
                self._process.wait(timeout=SECONDS_TO_END if after is not signal.SIGTERM else 1.0)
                break
            except subprocess.TimeoutExpired:
                if after is not None:
                    _signal_group(self._process.pid, after)
        _signal_group(self._process.pid, signal.SIGKILL)  # children that it has left

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "closed its standard output"
        return f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"

    def _note_error(self, line: bytes | None) -> None:
        if line is not None:
            self._errors.append(line[:1000])


def _started(work: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _read_lines(stream: IO[bytes], put: Callable[[bytes | None], None]) -> None:
    with contextlib.suppress(OSError, ValueError):
        while line := stream.readline(MAX_LINE_BYTES + 1):
            put(line)
    put(None)


def _write(stream: IO[bytes], unsent: queue.SimpleQueue[str | None]) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has ended, which its output shows
        while (text := unsent.get()) is not None:
            stream.write(text.encode())
            stream.flush()
    with contextlib.suppress(OSError, ValueError):
        stream.close()


def _signal_group(process_id: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_id, number)
