"""Run a stage's program as a process that gets this one's signals, and ends when this one does."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ds_dpo.config.asset_paths import PACKAGE
from ds_dpo.errors import StopAskedError
from ds_dpo.process.process_tree import die_with_parent

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Runs a whole command and returns its exit status.
Call = Callable[[Sequence[str]], int]


def call(command: Sequence[str]) -> int:
    """Run a command until its end, and return its exit status.

    A signal to stop reaches the program, which saves and ends. Raises StopAskedError after that.
    """
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # a session of its own, so that Ctrl-C reaches it once, through this process
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
    with _forwarding(process) as asked:
        status = process.wait()
    if asked:
        raise StopAskedError(f"stopped by {asked[0].name}; the same command goes on")
    return status


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[signal.Signals]]:
    """Send signals on to a process meanwhile; gives the list of those that came."""
    asked: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        if process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
