"""Files that take the place of others whole or not at all, under one scheme of temporary names."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
from collections.abc import Iterator
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """Return a hidden name beside a path, this process's own, to write under before the rename."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool) -> Iterator[Path]:
    """Give a temporary path to write a file at; at the end it takes the place of path, after an error it is removed.

    sync: the content and the rename are on the disk before this returns, so that a power cut undoes neither.
    Raises OSError.
    """
    temporary = partial_path(path)
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes, *, sync: bool, mode: int = 0o666) -> None:
    """Put content (text as UTF-8) in place of a file, or make it. mode: permissions, less the umask.

    sync: as in `replacing`. Raises OSError.
    """
    with replacing(path, sync=sync) as temporary:
        temporary.unlink(missing_ok=True)  # of an earlier process of the same number; it may have another mode
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


def remove_partials(folder: Path, *, recursive: bool = False) -> None:
    """Remove what killed processes left in a folder, in which no other process may be writing. Raises OSError."""
    pattern = f".*{PARTIAL_SUFFIX}"
    for path in folder.rglob(pattern) if recursive else folder.glob(pattern):
        path.unlink(missing_ok=True)


def remove_partials_of(path: Path) -> None:
    """Remove what killed processes left beside a path that no other process is writing. Raises OSError."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut. Raises OSError."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
