"""Hashes of model files, remembered between starts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from ds_dpo.errors import CheckpointError, ModelError
from ds_dpo.storage.manifest import hash_file
from ds_dpo.storage.replace import replace_file


def remembered_sha256(path: Path) -> str:
    """Return a file's SHA-256; a file is hashed again only if its path, size or a time of change differs.

    Hashes are kept in $XDG_CACHE_HOME/ds_dpo, by default ~/.cache/ds_dpo, because reading a text encoder takes seconds.
    Raises ModelError if the file cannot be read.
    """
    real = path.resolve()
    state = real.stat()
    # the second time also changes if a file of the same size and date takes its place
    facts = (real, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    key = hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:40]
    note = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_dpo" / "sha256" / key
    if note.is_file() and len(found := note.read_text(encoding="ascii").strip()) == 64:
        return found
    try:
        digest = hash_file(real).sha256
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    _remember(note, digest)
    return digest


def _remember(note: Path, digest: str) -> None:
    # on some clusters the home folder cannot be written: then files are hashed again each time, which takes seconds
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, digest + "\n", sync=False)
