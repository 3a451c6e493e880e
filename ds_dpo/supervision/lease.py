"""The lease: a file on the shared disk by which the ranks know that their launcher is alive.

The launcher overwrites it every RENEW_SECONDS; ranks exit if it stops changing. A second file beside it records how the
run ended. Both files have their full size from the start and are overwritten in place, so that they work on a full
disk.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

LEASE_VARIABLE = "DS_DPO_LEASE"  # in the ranks' environment: the path of the lease
FOLDER = "launch"  # in the run folder
RENEW_SECONDS = 2.0

# run: continue. stop: save and exit. hang: write the stacks and exit. end: exit.
Word = Literal["run", "stop", "hang", "end"]
WORDS: tuple[str, ...] = get_args(Word)
OUTCOME_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class Notice:
    """The content of a lease. count: grows with each renewal. launcher: its host and process, for messages."""

    word: str
    count: int
    launcher: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, as one of its ranks recorded it. status: that rank's exit status. how: in a few words."""

    status: int
    rank: int
    how: str


class Lease:
    """The launcher's side of a lease."""

    def __init__(self, run_folder: Path) -> None:
        """Create the files. Raises OSError if they cannot be written."""
        folder = (run_folder / FOLDER).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{secrets.token_hex(4)}.lease"
        self.word: Word = "run"
        self._count = 0
        self._launcher = f"{platform.node()} {os.getpid()}"
        _outcome_path(self.path).write_bytes(_padded(""))
        self.path.write_bytes(self._line())

    def renew(self) -> None:
        """Write the lease again, with the present word. Raises OSError."""
        self._count += 1
        _overwrite(self.path, self._line())

    def _line(self) -> bytes:
        return _line(Notice(word=self.word, count=self._count, launcher=self._launcher))

    def outcome(self) -> Outcome | None:
        """Return how a rank recorded the end of the run, or None."""
        return read_outcome(self.path)

    def remove(self) -> None:
        """Remove the files, when nobody reads them any more."""
        for path in (self.path, _outcome_path(self.path)):
            path.unlink(missing_ok=True)
        if not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def _line(notice: Notice) -> bytes:
    return f"{notice.word:<4} {notice.count:012d} {notice.launcher}\n".encode()


def _padded(text: str) -> bytes:
    return text.encode()[: OUTCOME_BYTES - 1].ljust(OUTCOME_BYTES - 1) + b"\n"


def _overwrite(path: Path, content: bytes) -> None:
    """Overwrite a file in place. Raises OSError.

    Closing the file sends it to an NFS server. There is no fsync: on a local disk other processes see the content
    without it, and it would wait for a checkpoint that is being written to the same disk.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)


def read_notice(path: Path) -> Notice | None:
    """Return the content of a lease, None if it cannot be read.

    The file is opened each time, because an NFS client asks its server for changes when it opens a file.
    """
    try:
        word, count, launcher = path.read_text(encoding="utf-8").strip().split(maxsplit=2)
        return Notice(word=word, count=int(count), launcher=launcher) if word in WORDS else None
    except (OSError, ValueError):
        return None


def leases(run_folder: Path) -> Iterator[Path]:
    """Yield the leases of this and of earlier launches in a run folder."""
    yield from sorted((run_folder / FOLDER).glob("*.lease"))


def end_lease(path: Path) -> None:
    """Make the ranks of a dead launcher exit. Raises OSError."""
    notice = read_notice(path)
    launcher = "unknown" if notice is None else notice.launcher
    _overwrite(path, _line(Notice(word="end", count=0, launcher=launcher)))


def remove_lease(path: Path) -> None:
    for each in (path, _outcome_path(path)):
        each.unlink(missing_ok=True)


def record_outcome(path: Path, outcome: Outcome) -> None:
    """Record for the launcher how this run ended; the first failure is kept. Raises OSError."""
    earlier = read_outcome(path)
    if earlier is None or earlier.status == 0:
        _overwrite(_outcome_path(path), _padded(f"{outcome.status} {outcome.rank} {outcome.how}"))


def read_outcome(path: Path) -> Outcome | None:
    """Return the outcome recorded beside a lease, None if there is none or it cannot be read."""
    try:
        status, rank, how = _outcome_path(path).read_text(encoding="utf-8").strip().split(maxsplit=2)
        return Outcome(status=int(status), rank=int(rank), how=how)
    except (OSError, ValueError):
        return None


def _outcome_path(path: Path) -> Path:
    return path.with_suffix(".outcome")
