"""Read what comes from outside: regular files only, since a pipe or a device may never end, and JSON within bounds."""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading bytes, without waiting. Raises OSError, also for what is not a regular file."""
    # a named pipe that nobody writes to would block an open without O_NONBLOCK
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path) -> None:
    """Raise OSError if a file is missing or is not regular: for a library that opens files by their names."""
    _require_regular(path.stat().st_mode, path)


def check_all_regular(folder: Path) -> None:
    """Raise OSError for a pipe, socket or device in a folder whose files a library opens by names of its own."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():  # a link to nothing is as good as none
            check_regular(path)


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Return the bytes of a file. Raises OSError as open_regular does, and for a file with more bytes."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"is larger than {max_bytes / 2**20:g} MiB", str(path))
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of any origin. Raises ValueError, and nothing else, for text that is none or that nests too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _require_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        what = KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"is {what}, not a regular file", str(path))
