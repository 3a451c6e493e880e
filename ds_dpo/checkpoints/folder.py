"""The folder of a run's checkpoints: its names, which checkpoints stay, and how ranks act on it together."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.distributed.collectives import rank, world_size
from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.errors import CheckpointError
from ds_dpo.process.say import Say
from ds_dpo.storage import manifest
from ds_dpo.storage.replace import replace_file

LATEST = "latest"
PARTIAL_PREFIX = "partial_"
DELETED_PREFIX = "deleted_"
REPLACED_SUFFIX = ".replaced"
DAMAGED_SUFFIX = ".damaged"
_RANK_OF_FILE = re.compile(r"(?:zero_pp|ema|reference)_rank_(\d+)[_.]")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the newest ones, all multiples of every_steps, the best, and one for a roll-back."""

    newest: int
    every_steps: int | None = None

    def to_delete(
        self, steps: Sequence[int], *, saved: int, protected: int | None, best: int | None = None
    ) -> list[int]:
        """Return which of the steps on disk to delete once `saved` is complete.

        A checkpoint of a later step could not be used at the start: it does not count as newer, and stays. protected:
        the newest checkpoint of this step or before stays too. best: this step stays.
        """
        older = sorted((step for step in steps if step <= saved), reverse=True)
        reachable = [step for step in older if protected is not None and step <= protected][:1]
        kept = {*reachable, best}
        return [step for step in older[self.newest :] if step not in kept and not self.is_kept_for_ever(step)]

    def is_kept_for_ever(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0


@contextmanager
def together_on_disk() -> Iterator[None]:
    """Raise an error of the body on all ranks. An OSError becomes a CheckpointError that names the rank."""
    with raised_everywhere():
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"the checkpoint could not be written{where()}: {error}") from error


def where() -> str:
    """Return which rank this is, for a message; an empty text if there is only one."""
    return f" by rank {rank()} on {socket.gethostname()}" if world_size() > 1 else ""


def recover_interrupted(folder: Path, say: Say) -> None:
    """Rename a checkpoint that a kill between the renames of a save left under another name; on rank 0 only.

    A folder with a manifest is complete and gets its final name. A folder that was moved away, with nothing in its
    place, gets its name back. Raises OSError if the disk refuses.
    """
    for partial in sorted(folder.glob(f"{PARTIAL_PREFIX}step_*")):
        final = folder / partial.name.removeprefix(PARTIAL_PREFIX)
        if not final.exists() and _is_complete(partial):
            os.replace(partial, final)
            point_latest(final)
            say(f"completed {final}: its save was interrupted after everything was written")
    for aside in sorted(folder.glob(f"step_*{REPLACED_SUFFIX}*")):
        final = folder / aside.name.partition(REPLACED_SUFFIX)[0]
        if not final.exists():
            os.replace(aside, final)
            point_latest(final)
            say(f"restored {final}: its replacement was never completed")


def _is_complete(folder: Path) -> bool:
    try:
        manifest.verify_manifest(folder, checksums=False)
    except CheckpointError:
        return False
    return True


def point_latest(folder: Path) -> None:
    """Make `latest` name a checkpoint, durably; call it after the checkpoint's rename."""
    replace_file(folder.with_name(LATEST), folder.name + "\n", sync=True)


def rank_of(name: str) -> int:
    """Return the rank that wrote a file: shards have it in their names, rank 0 writes all else."""
    match = _RANK_OF_FILE.search(name)
    return int(match[1]) if match else 0


def unused_name(path: Path) -> Path:
    """Return a path that does not exist: the given one, or the given one with a number."""
    tries = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in tries if not other.exists())


def gib(size: int) -> str:
    """Return a number of bytes in GiB, with three digits."""
    return f"{size / 2**30:.3g}"
