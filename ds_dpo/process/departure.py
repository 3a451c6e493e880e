"""How a process leaves at once, and the statuses that say why."""

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
SIGNAL_STATUS_BASE = 128  # plus the signal's number, as shells have it

PATIENCE_SECONDS = 5.0  # with a disk or a terminal that may never take what is written


def leave(status: int, last_words: Callable[[], None]) -> NoReturn:
    """End this process from any thread, whatever its other threads do. last_words: says and records why."""
    try_for_a_while(last_words)
    try_for_a_while(_flush)
    os._exit(status)


def try_for_a_while(work: Callable[[], None]) -> None:
    """Do what may never come back, such as writing to a disk that is gone, and go on after PATIENCE_SECONDS."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(PATIENCE_SECONDS)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def say(text: str) -> None:
    """Print a line on standard error, in one piece: several ranks write to the same place."""
    os.write(2, f"{text}\n".encode())
