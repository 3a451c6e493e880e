"""The file by which a launcher and its ranks know of each other, on the disk that they share.

The launcher overwrites it every RENEW_SECONDS; ranks that see no change any more leave. What ranks have to say goes
into a second file beside it. Both have their full size from the start and are only overwritten, in place, so that a
full disk does not matter.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

LEASE_VARIABLE = "DS_DPO_LEASE"  # of the ranks' environment: the file's path
FOLDER = "launch"  # in the run folder
RENEW_SECONDS = 2.0

# run: go on. stop: save and leave. hang: write down your stacks and leave. end: leave.
Word = Literal["run", "stop", "hang", "end"]
WORDS: tuple[str, ...] = get_args(Word)
OUTCOME_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a lease says. count: grows with each renewal. launcher: whose it is, for people."""

    word: str
    count: int
    launcher: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, as one of its ranks tells it. status: what that rank left with. how: in a few words."""

    status: int
    rank: int
    how: str


class Lease:
    """The launcher's side."""

    def __init__(self, run_folder: Path) -> None:
        """Make the files. Raises OSError where they cannot be written."""
        folder = (run_folder / FOLDER).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{secrets.token_hex(4)}.lease"
        self.word: Word = "run"
        self._count = 0
        self._launcher = f"{platform.node()} {os.getpid()}"
        _outcome_path(self.path).write_bytes(_padded(""))
        self.path.write_bytes(self._line())

    def renew(self) -> None:
        """Write it anew, with the present word. Raises OSError."""
        self._count += 1
        _overwrite(self.path, self._line())

    def _line(self) -> bytes:
        return _line(Notice(word=self.word, count=self._count, launcher=self._launcher))

    def outcome(self) -> Outcome | None:
        """Return what a rank has recorded."""
        return read_outcome(self.path)

    def remove(self) -> None:
        """Take the files away, once nobody is left who reads them."""
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

    Closing is what sends it to an NFS server. There is no fsync: on a local disk others see it without, and it would
    wait for a checkpoint that is being written to the same disk.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)


def read_notice(path: Path) -> Notice | None:
    """Return what a lease says; None where it cannot be read.

    The file is opened anew each time: that is when an NFS client asks its server whether it has changed.
    """
    try:
        word, count, launcher = path.read_text(encoding="utf-8").strip().split(maxsplit=2)
        return Notice(word=word, count=int(count), launcher=launcher) if word in WORDS else None
    except (OSError, ValueError):
        return None


def leases(run_folder: Path) -> Iterator[Path]:
    """Yield the leases in a run folder, of this and of earlier launches."""
    yield from sorted((run_folder / FOLDER).glob("*.lease"))


def end_lease(path: Path) -> None:
    """Let the ranks of a launcher that is gone leave. Raises OSError."""
    notice = read_notice(path)
    launcher = "unknown" if notice is None else notice.launcher
    _overwrite(path, _line(Notice(word="end", count=0, launcher=launcher)))


def remove_lease(path: Path) -> None:
    for each in (path, _outcome_path(path)):
        each.unlink(missing_ok=True)


def record_outcome(path: Path, outcome: Outcome) -> None:
    """Tell the launcher how this run ended; the first failure stands. Raises OSError."""
    earlier = read_outcome(path)
    if earlier is None or earlier.status == 0:
        _overwrite(_outcome_path(path), _padded(f"{outcome.status} {outcome.rank} {outcome.how}"))


def read_outcome(path: Path) -> Outcome | None:
    """Return what a rank has recorded beside a lease; None where nothing is, or it cannot be read."""
    try:
        status, rank, how = _outcome_path(path).read_text(encoding="utf-8").strip().split(maxsplit=2)
        return Outcome(status=int(status), rank=int(rank), how=how)
    except (OSError, ValueError):
        return None


def _outcome_path(path: Path) -> Path:
    return path.with_suffix(".outcome")
