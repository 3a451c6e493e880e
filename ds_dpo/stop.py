"""How a run is asked to stop: a STOP file in its folder, SIGTERM or SIGUSR1 on any one rank."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a request; the trainer reduces it over ranks once a step, so that all stop at the same one.

    A signal handler only sets a flag: a collective inside it would meet other ranks at another place. A second
    signal acts as if there were no handler, and ends the process at once.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._signal: int | None = None

    def listen(self) -> None:
        """Take over the signals; from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def is_asked(self, *, look_for_file: bool) -> bool:
        """True once this rank was asked; only one rank needs to look for the file."""
        return self._signal is not None or (look_for_file and self._stop_file.exists())

    def clear_file(self) -> None:
        """Remove the STOP file once it was followed, or the next start would stop at its first step."""
        self._stop_file.unlink(missing_ok=True)
