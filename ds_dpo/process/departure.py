"""Exit a process at once, with a status that says why."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

EXIT_STATUS_OF_FAILURE = 1  # 2 is a refusal with a message: errors.EXIT_STATUS_OF_ERROR
EXIT_STATUS_OF_HANG = 70
EXIT_STATUS_OF_LOST_LEASE = 71
EXIT_STATUS_OF_LOST_PARENT = 72
SIGNAL_STATUS_BASE = 128  # plus the signal's number, as in shells

PATIENCE_SECONDS = 5.0  # for a disk or a terminal that may never accept the write


def leave(status: int, last_words: Callable[[], None]) -> NoReturn:
    """End this process from any thread, without waiting for the other threads. last_words: prints and records why."""
    try_for_a_while(last_words)
    try_for_a_while(_flush)
    os._exit(status)


def try_for_a_while(work: Callable[[], None]) -> None:
    """Do work that may never return, such as a write to a lost disk, and continue after PATIENCE_SECONDS."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(PATIENCE_SECONDS)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def say(text: str) -> None:
    """Print a line on standard error in one write, because several ranks print to the same place."""
    os.write(2, f"{text}\n".encode())
