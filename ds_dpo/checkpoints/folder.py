"""The folder of a run's checkpoints: what its names mean, which stay, and how ranks act on it together."""

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

LATEST = "latest"
PARTIAL_PREFIX = "partial_"
DELETED_PREFIX = "deleted_"
REPLACED_SUFFIX = ".replaced"
DAMAGED_SUFFIX = ".damaged"
_RANK_OF_FILE = re.compile(r"(?:zero_pp|ema)_rank_(\d+)[_.]")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint belongs to: the ranks and ZeRO stage it was cut for, and the run's identity as a hash."""

    world_size: int
    stage: int
    precision: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the newest, multiples of every_steps for ever, and one that a roll-back may need."""

    newest: int
    every_steps: int | None = None

    def to_delete(self, steps: Sequence[int], *, saved: int, protected: int | None) -> list[int]:
        """Return which of the steps on disk go once `saved` is complete.

        One of a later step was passed over at the start: it does not count as newer, and stays. protected: the newest
        checkpoint of this step or before stays too.
        """
        older = sorted((step for step in steps if step <= saved), reverse=True)
        reachable = [step for step in older if protected is not None and step <= protected][:1]
        return [step for step in older[self.newest :] if step not in reachable and not self.is_kept_for_ever(step)]

    def is_kept_for_ever(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0


@contextmanager
def together_on_disk() -> Iterator[None]:
    """Let every rank know if the body of one failed; an OSError is then a CheckpointError that names the rank."""
    with raised_everywhere():
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"the checkpoint could not be written{where()}: {error}") from error


def where() -> str:
    """Return which rank this is, for a message; nothing where there is one."""
    return f" by rank {rank()} on {socket.gethostname()}" if world_size() > 1 else ""


def recover_interrupted(folder: Path, say: Say) -> None:
    """Give a checkpoint its name that a kill between the renames of a save left under another; rank 0 alone.

    A folder with a manifest was agreed on by all ranks: it goes forward. One that was to be replaced, with nothing in
    its place, goes back. Raises OSError where the disk refuses.
    """
    for partial in sorted(folder.glob(f"{PARTIAL_PREFIX}step_*")):
        final = folder / partial.name.removeprefix(PARTIAL_PREFIX)
        if not final.exists() and _is_complete(partial):
            os.replace(partial, final)
            point_latest(final)
            say(f"completed {final}: its save had been cut off after all was written")
    for aside in sorted(folder.glob(f"step_*{REPLACED_SUFFIX}*")):
        final = folder / aside.name.partition(REPLACED_SUFFIX)[0]
        if not final.exists():
            os.replace(aside, final)
            point_latest(final)
            say(f"put {final} back: what was to replace it never came to be")


def _is_complete(folder: Path) -> bool:
    try:
        manifest.verify_manifest(folder, checksums=False)
    except CheckpointError:
        return False
    return True


def point_latest(folder: Path) -> None:
    """Let `latest` name a checkpoint, after its rename, for good."""
    temporary = folder.with_name(f"{LATEST}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(folder.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder.with_name(LATEST))
    manifest.sync_folder(folder.parent)


def rank_of(name: str) -> int:
    """Return the rank that wrote a file: the shards name theirs, all else is rank 0's."""
    match = _RANK_OF_FILE.search(name)
    return int(match[1]) if match else 0


def unused_name(path: Path) -> Path:
    """Return a path at which there is nothing: the one given, or with a number after it."""
    tries = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in tries if not other.exists())


def gib(size: int) -> str:
    """Write a number of bytes as GiB, to three digits."""
    return f"{size / 2**30:.3g}"
