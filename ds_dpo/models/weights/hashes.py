"""Hashes of model files, remembered between starts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from ds_dpo.config.base import home
from ds_dpo.errors import CheckpointError, ModelError
from ds_dpo.outside import read_regular
from ds_dpo.storage.manifest import hash_file
from ds_dpo.storage.replace import replace_file

HASH = re.compile("[0-9a-f]{64}")


def remembered_sha256(path: Path) -> str:
    """Return a file's SHA-256; a file is hashed again only if its path, size or a time of change differs.

    Hashes are kept in $XDG_CACHE_HOME/ds_dpo, by default ~/.cache/ds_dpo, because reading a text encoder takes seconds.
    Raises ModelError if the file cannot be read.
    """
    try:
        real = path.resolve()
        state = real.stat()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    # the second time also changes if a file of the same size and date takes its place
    facts = (real, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    key = hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:40]
    note = _notes() / key
    if (found := _remembered(note)) is not None:
        return found
    try:
        digest = hash_file(real).sha256
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    _remember(note, digest)
    return digest


def _notes() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or (home() or Path(os.devnull)) / ".cache"
    return Path(cache).absolute() / "ds_dpo" / "sha256"


# In containers and on some clusters there is no home folder, or it cannot be read or written: then files are hashed
# again each time, which takes seconds.


def _remembered(note: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = read_regular(note, max_bytes=1024).decode("ascii").strip()
        return found if HASH.fullmatch(found) else None
    return None


def _remember(note: Path, digest: str) -> None:
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, digest + "\n", sync=False)
