"""The writing half of checkpoints: copied where training goes on meanwhile, written aside, agreed on, renamed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ds_dpo import manifest
from ds_dpo.distributed import gather_objects, is_main, raise_together, rank, world_size
from ds_dpo.engine import Engine
from ds_dpo.errors import CheckpointError
from ds_dpo.fault_points import reach
from ds_dpo.host_memory import available_bytes
from ds_dpo.manifest import FileEntry, Manifest
from ds_dpo.state_files import HostCopies, StateFile, num_bytes

LATEST = "latest"
PARTIAL_PREFIX = "partial_"
DELETED_PREFIX = "deleted_"
REPLACED_SUFFIX = ".replaced"
DAMAGED_SUFFIX = ".damaged"
UNET_CONFIG = "unet_config.json"
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


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint is to hold beside the engine's state. files: this rank's."""

    client_state: Mapping[str, Any]
    files: Sequence[StateFile] = ()


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint, and how long it took this rank.

    copied_seconds: how long training waited for a copy; None where it waited until all was written.
    """

    folder: Path
    copied_seconds: float | None
    written_seconds: float


@dataclass(kw_only=True)
class _Job:
    """Writing this rank's files of one checkpoint, here or in a thread; what became of it is asked for afterwards."""

    step: int
    partial: Path
    final: Path
    renews: bool
    files: Sequence[StateFile]
    copied_seconds: float | None = None
    began: float = field(default_factory=time.perf_counter)
    written_seconds: float = 0.0
    entries: dict[str, FileEntry] = field(default_factory=dict)
    error: Exception | None = None
    is_abandoned: bool = False
    thread: threading.Thread | None = None

    def write(self) -> None:
        """Write, sync and hash; an error is kept for the moment at which all ranks ask."""
        started = time.perf_counter()
        try:
            reach("save.copied")
            for file in self.files:
                if self.is_abandoned:
                    return
                reach("save.write")
                file.write(file.state, self.partial / file.name)
            reach("save.written")
            self.entries = {file.name: _sync_and_hash(self.partial / file.name) for file in self.files}
            reach("save.hashed")
        except Exception as error:
            self.error = error
        self.written_seconds = time.perf_counter() - started

    def start(self) -> None:
        """Write in a thread; one that a leaving program waits for, since torch does not survive being cut off."""
        self.thread = threading.Thread(target=self.write, name=f"save-step-{self.step}", daemon=False)
        self.thread.start()

    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; begin and finish are called by all ranks together."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        identity: RunIdentity,
        retention: Retention,
        report: Callable[[str], None],
        available_bytes: Callable[[], int | None] = available_bytes,
    ) -> None:
        """report: says what was found amiss and how it was dealt with. available_bytes: memory of this host."""
        self._folder = folder
        self._engine, self._identity, self._retention = engine, identity, retention
        self._report, self._available_bytes = report, available_bytes
        self._copies = HostCopies()
        self._job: _Job | None = None
        self._protected_step: int | None = None

    @property
    def is_in_flight(self) -> bool:
        """True from begin to finish, on all ranks alike."""
        return self._job is not None

    @property
    def is_busy(self) -> bool:
        """True while this rank's files are being written in the background."""
        return self._job is not None and self._job.is_alive()

    def protect(self, step: int | None) -> None:
        """Keep the newest checkpoint of this step or before beside the others, until told otherwise."""
        self._protected_step = step

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, unread; for messages."""
        folders = manifest.checkpoint_folders(self._folder)
        return next((folder for folder in folders if (folder / manifest.MANIFEST_NAME).is_file()), None)

    def save(self, *, step: int, contents: Contents, renews: bool = False) -> Saved:
        """Write the checkpoint of a step while training waits; see begin and finish."""
        self.begin(step=step, contents=contents, renews=renews, in_background=False)
        return self.finish()

    def begin(
        self,
        *,
        step: int,
        contents: Contents,
        in_background: bool,
        renews: bool = False,
        first: Callable[[], None] = lambda: None,
    ) -> bool:
        """Write this rank's files of a step aside; in the background: copy their state, and write it in a thread.

        Returns whether a thread writes; False where a host has no memory for the copies: then all ranks have written.
        first: done on rank 0 before. renews: one of the same step, loaded just now, is replaced for good. Raises
        CheckpointError on all ranks together, with nothing left behind, where there is no space; whether writing went
        well is finish's to say.
        """
        assert self._job is None, "one checkpoint at a time"
        final = self._folder / manifest.step_folder_name(step)
        partial = self._folder / (PARTIAL_PREFIX + final.name)
        together(lambda: reach("save.begin"))
        files = [*self._engine.checkpoint_files(client_state=contents.client_state), *contents.files]
        files += self._unet_config()
        assert all(rank_of(file.name) == rank() for file in files), "whose file it is must show in its name"
        has_memory, size = self._measure(files, in_background=in_background)
        try:
            together(lambda: self._open(partial, size, first), when=is_main())
        except CheckpointError:
            self._discard(partial)
            raise
        job = _Job(step=step, partial=partial, final=final, renews=renews, files=files)
        self._job = job
        if not (in_background and has_memory):
            job.write()
            return False
        started = time.perf_counter()
        try:
            job.files = self._copies.copy(files)
        except Exception as error:  # one rank's: the others are told in finish
            job.error = error
            return True
        job.copied_seconds = time.perf_counter() - started
        job.start()
        return True

    def finish(self) -> Saved:
        """Wait for all ranks' files and make the checkpoint exist.

        Raises CheckpointError on all ranks together, with nothing left behind, where the disk refused any rank: earlier
        checkpoints and `latest` are as they were. A kill at any moment leaves them so, too.
        """
        job = self._job
        assert job is not None, "begun"
        job.wait()
        self._copies.release()
        self._job = None
        try:
            together(lambda: _raise_error_of(job))
            files: dict[str, FileEntry] = {}
            for part in gather_objects(job.entries):
                assert isinstance(part, dict)
                files |= part
            together(lambda: reach("save.agreed"))
            together(lambda: self._complete(job, files), when=is_main())
        except CheckpointError:
            self._discard(job.partial)
            raise
        seconds = time.perf_counter() - job.began if job.copied_seconds is None else job.written_seconds
        return Saved(folder=job.final, copied_seconds=job.copied_seconds, written_seconds=seconds)

    def abandon(self) -> None:
        """Let a thread that still writes stop at the next file; for a program that leaves without its checkpoint."""
        if self._job is not None:
            self._job.is_abandoned = True

    def require_space(self, *, further_bytes: int, saves_left: int, in_background: bool) -> list[str]:
        """Return what the run's checkpoints will take of disk and memory, in words, before anything is trained.

        further_bytes: this rank's files beside the engine's. saves_left: how many checkpoints are to come. While one is
        written, those that it will push out are still there. Raises CheckpointError on all ranks together where the
        disk has no room for as many more as will stand at a time.
        """
        further = [int(str(size)) for size in gather_objects(further_bytes)]
        size, kept = self._engine.checkpoint_bytes() + sum(further), self._retention.newest
        together(lambda: self._check_start(size, saves_left), when=is_main())
        lines = [f"checkpoints: about {_gib(size)} GiB each, at most {kept} stay and one more while it is written"]
        if in_background:
            own = self._engine.own_checkpoint_bytes() + further_bytes
            most = max(int(str(size)) for size in gather_objects(own))
            lines.append(
                f"checkpoints: written in the background from copies of up to {_gib(most)} GiB a rank in host memory"
            )
        return lines

    def _check_start(self, size: int, saves_left: int) -> None:
        present = len(manifest.checkpoint_folders(self._folder))
        more = min(self._retention.newest + 1 - min(present, self._retention.newest), max(saves_left, 1))
        self._require_free(more * size, f"{more} more of about {_gib(size)} GiB will stand there at a time")

    def _require_free(self, needed: int, why: str) -> None:
        # a start that is refused here leaves no folder behind
        existing = next(path for path in (self._folder.absolute(), *self._folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise CheckpointError(
                f"no space for a checkpoint in {self._folder}: {why}, and {_gib(free)} GiB are free; free some, lower "
                "cadence.keep_checkpoints, or give another output_dir"
            )

    def _measure(self, files: Sequence[StateFile], *, in_background: bool) -> tuple[bool, int]:
        """Return whether every host has memory for its ranks' copies, and how many bytes all ranks will write."""
        to_allocate = self._copies.bytes_to_allocate(files)
        own = (socket.gethostname(), to_allocate, self._available_bytes(), num_bytes(files))
        needed: dict[str, int] = {}
        available: dict[str, int] = {}
        size = 0
        for part in gather_objects(own):
            assert isinstance(part, tuple)
            host, host_bytes, host_available, file_bytes = part
            needed[host] = needed.get(host, 0) + host_bytes
            if host_available is not None:
                available[host] = min(available.get(host, host_available), host_available)
            size += file_bytes
        short = [host for host in available if needed[host] > available[host]]
        if short and in_background:
            self._report(
                f"{short[0]} has {_gib(available[short[0]])} GiB of memory left and a copy of its ranks' state takes "
                f"{_gib(needed[short[0]])} GiB: training waits until this checkpoint is written"
            )
        return not short, size

    def _open(self, partial: Path, size: int, first: Callable[[], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for pattern in (f"{PARTIAL_PREFIX}*", f"{DELETED_PREFIX}*", f"step_*{REPLACED_SUFFIX}*"):
            for leftover in self._folder.glob(pattern):  # what a killed save left
                shutil.rmtree(leftover)
        first()
        self._require_free(size, f"this one takes {_gib(size)} GiB")
        partial.mkdir()

    def _unet_config(self) -> list[StateFile]:
        if not is_main():
            return []
        module: Any = self._engine.module  # a diffusers model, whose config torch's Module does not know
        config = {name: value for name, value in module.config.items() if not name.startswith("_name")}
        return [StateFile(name=UNET_CONFIG, state=json.dumps(config, indent=2, default=list), write=_write_text)]

    def _complete(self, job: _Job, files: dict[str, FileEntry]) -> None:
        """Make the checkpoint exist: manifest, rename, `latest`; only then delete older ones."""
        identity = self._identity
        manifest.write_manifest(
            job.partial,
            Manifest(
                step=job.step,
                world_size=identity.world_size,
                stage=identity.stage,
                precision=identity.precision,
                fingerprint=identity.fingerprint,
                layout=self._engine.layout_digest(),
                files=files,
            ),
        )
        reach("save.manifest")
        replaced: Path | None = None
        if job.final.exists():  # a damaged one of the same step is kept aside for whoever wants to look
            suffix = REPLACED_SUFFIX if job.renews else DAMAGED_SUFFIX
            replaced = unused_name(job.final.with_name(job.final.name + suffix))
            os.replace(job.final, replaced)
            reach("save.moved_old")
        os.replace(job.partial, job.final)
        reach("save.renamed")
        point_latest(job.final)
        reach("save.latest")
        if job.renews and replaced is not None:
            self._delete(replaced)
        self._prune(newest=job.step)
        reach("save.pruned")

    def _prune(self, *, newest: int) -> None:
        folders = {manifest.step_of(folder) or 0: folder for folder in manifest.checkpoint_folders(self._folder)}
        for step in self._retention.to_delete(list(folders), saved=newest, protected=self._protected_step):
            self._delete(folders[step])

    def _delete(self, folder: Path) -> None:
        """Delete a checkpoint so that a kill leaves nothing that looks like one; the new one is there either way."""
        try:
            gone = unused_name(folder.with_name(DELETED_PREFIX + folder.name))
            os.replace(folder, gone)
            shutil.rmtree(gone)
        except OSError as error:
            self._report(f"{folder} should go and cannot be deleted: {error}")

    def _discard(self, partial: Path) -> None:
        """Remove what a failed save left; where the disk refuses even that, the next save tries again."""
        if is_main():
            try:
                shutil.rmtree(partial)
            except FileNotFoundError:
                pass
            except OSError as error:
                self._report(f"{partial}: cannot be removed: {error}")


Result = TypeVar("Result")


def together(action: Callable[[], Result], *, when: bool = True) -> Result | None:
    """Do a rank's part, then let every rank know if one of them failed; a refusing disk is a CheckpointError."""
    result: Result | None = None
    error: Exception | None = None
    if when:
        try:
            result = action()
        except CheckpointError as caught:
            error = caught
        except OSError as caught:
            error = CheckpointError(f"the checkpoint could not be written{_where()}: {caught}")
        except Exception as caught:  # of the program, and not of the disk: it ends the run, on all ranks
            error = caught
    raise_together(error)
    return result


def _raise_error_of(job: _Job) -> None:
    if job.error is None:
        return
    text = str(job.error)
    if isinstance(job.error, MemoryError) or "DefaultCPUAllocator" in text:
        raise CheckpointError(f"no memory to copy the state into{_where()}: {text}") from job.error
    if isinstance(job.error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        # torch says this, and no OSError, where the disk takes only part of a file
        free = shutil.disk_usage(job.final.parent).free
        raise CheckpointError(
            f"the checkpoint could not be written{_where()} in {job.final.parent}: a file was cut short, {_gib(free)} "
            f"GiB are free ({text})"
        ) from job.error
    raise job.error


def _where() -> str:
    return f" by rank {rank()} on {socket.gethostname()}" if world_size() > 1 else ""


def recover_interrupted(folder: Path, report: Callable[[str], None]) -> None:
    """Give a checkpoint its name that a kill between the renames of a save left under another; rank 0 alone.

    A folder with a manifest was agreed on by all ranks: it goes forward. One that was to be replaced, with nothing in
    its place, goes back. Raises OSError where the disk refuses.
    """
    for partial in sorted(folder.glob(f"{PARTIAL_PREFIX}step_*")):
        final = folder / partial.name.removeprefix(PARTIAL_PREFIX)
        if not final.exists() and _is_complete(partial):
            os.replace(partial, final)
            point_latest(final)
            report(f"completed {final}: its save had been cut off after all was written")
    for aside in sorted(folder.glob(f"step_*{REPLACED_SUFFIX}*")):
        final = folder / aside.name.partition(REPLACED_SUFFIX)[0]
        if not final.exists():
            os.replace(aside, final)
            point_latest(final)
            report(f"put {final} back: what was to replace it never came to be")


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


def _sync_and_hash(path: Path) -> FileEntry:
    """Put a file on the disk for good, then read it back for its checksum."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return manifest.hash_file(path)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
