"""A text file that grows line by line and survives a full disk: lines that cannot be written yet stay in memory."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def warn(text: str) -> None:
    """Print to standard error; an error is ignored, because that may be a file on the same full disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class LineFile:
    """Appends whole pieces of text; a full disk never ends a run because of its log."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises OSError if that is impossible."""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._kept = b""

    def write(self, text: str) -> None:
        """Append text, after any text that is still in memory. What cannot be written is kept, with one warning."""
        was_refused = bool(self._kept)
        self._kept += text.encode()
        error = self._write_kept()
        if error is not None and not was_refused:
            warn(f"{self._path}: {error.strerror}; its lines stay in memory until the disk accepts them")

    def sync(self) -> None:
        """Write what is in memory and sync the file. Raises OSError if the disk refuses any of it."""
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
                # a disk may accept only a part; the loop writes the rest
                self._kept = self._kept[os.write(self._descriptor, self._kept) :]
            except OSError as error:
                return error
        return None
