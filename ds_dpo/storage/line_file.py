"""A text file that grows line by line and outlives a full disk: what the disk refuses is kept, and written later."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def warn(text: str) -> None:
    """Print on standard error, unless that is a file on the same full disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class LineFile:
    """Appends whole pieces of text; a refusing disk never ends a run because of its log."""

    def __init__(self, path: Path) -> None:
        """Open the file, or start it. Raises OSError where there can be none."""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._kept = b""

    def write(self, text: str) -> None:
        """Append text, and before it what was refused earlier; kept in memory, and said once, where it is refused."""
        was_refused = bool(self._kept)
        self._kept += text.encode()
        error = self._write_kept()
        if error is not None and not was_refused:
            warn(f"{self._path}: {error.strerror}; its lines are kept in memory until the disk takes them")

    def sync(self) -> None:
        """Put all that was written on the disk for good. Raises OSError where it refuses any of it."""
        error = self._write_kept()
        if error is not None:
            raise error
        os.fsync(self._descriptor)

    def close(self) -> None:
        self._write_kept()
        os.close(self._descriptor)

    def _write_kept(self) -> OSError | None:
        while self._kept:
            try:
                # a disk may take a part; the rest follows it
                self._kept = self._kept[os.write(self._descriptor, self._kept) :]
            except OSError as error:
                return error
        return None
