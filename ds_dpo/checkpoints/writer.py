"""Write checkpoints: copy the state if training continues, write it aside, agree on it with all ranks, rename it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.checkpoints.best import BestCheckpoint
from ds_dpo.checkpoints.folder import (
    DAMAGED_SUFFIX,
    DELETED_PREFIX,
    PARTIAL_PREFIX,
    REPLACED_SUFFIX,
    Retention,
    gib,
    point_latest,
    rank_of,
    together_on_disk,
    unused_name,
)
from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.checkpoints.job import WritingJob
from ds_dpo.distributed.collectives import gather_objects, is_main, rank
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import CheckpointError
from ds_dpo.process.fault_points import reach
from ds_dpo.process.host_memory import available_bytes
from ds_dpo.process.say import Say
from ds_dpo.storage import manifest
from ds_dpo.storage.manifest import DENOISER_CONFIG_NAME, FileEntry, Manifest
from ds_dpo.storage.replace import remove_partials
from ds_dpo.storage.state_files import HostCopies, StateFile, num_bytes


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint holds besides the engine's state. files: those of this rank."""

    client_state: Mapping[str, Any]
    files: Sequence[StateFile] = ()


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint, and how long it took this rank.

    copied_seconds: how long training waited for the copy; None if it waited until everything was written.
    """

    folder: Path
    copied_seconds: float | None
    written_seconds: float


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; all ranks call begin and finish together."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        identity: RunIdentity,
        retention: Retention,
        say: Say,
        best: BestCheckpoint | None = None,
        available_bytes: Callable[[], int | None] = available_bytes,
    ) -> None:
        """say: takes a line for each problem, and what was done about it. best: marks one that stays.

        available_bytes: memory left on this host.
        """
        self._folder = folder
        self._engine, self._identity, self._retention = engine, identity, retention
        self._say, self._best, self._available_bytes = say, best, available_bytes
        self._copies = HostCopies()
        self._job: WritingJob | None = None
        self._protected_step: int | None = None

    @property
    def is_in_flight(self) -> bool:
        """Whether a save has begun and not finished; the same on all ranks."""
        return self._job is not None

    @property
    def is_busy(self) -> bool:
        """Whether this rank's files are being written in the background."""
        return self._job is not None and self._job.is_alive()

    def protect(self, step: int | None) -> None:
        """Also keep the newest checkpoint of this step or before, until the next call."""
        self._protected_step = step

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint without verifying it; for messages."""
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
        """Write this rank's files of a step aside; in the background: copy their state, and write it on a thread.

        Returns whether a thread writes. It is False, with everything written, if a host has no memory for the copies.
        first: called on rank 0 before. renews: replace the checkpoint of the same step, which was just loaded. Raises
        CheckpointError on all ranks, with nothing left behind, if there is no space. Errors of the writing itself are
        raised by finish.
        """
        assert self._job is None, "one checkpoint at a time"
        final = self._folder / manifest.step_folder_name(step)
        partial = self._folder / (PARTIAL_PREFIX + final.name)
        with together_on_disk():
            reach("save.begin")
        files = [*self._engine.checkpoint_files(client_state=contents.client_state), *contents.files]
        files += self._denoiser_config()
        assert all(rank_of(file.name) == rank() for file in files), "the name of a file must say which rank writes it"
        has_memory, size = self._measure(files, in_background=in_background)
        try:
            with together_on_disk():
                if is_main():
                    self._open(partial, size, first)
        except CheckpointError:
            self._discard(partial)
            raise
        job = WritingJob(step=step, partial=partial, final=final, renews=renews, files=files)
        self._job = job
        if not (in_background and has_memory):
            job.write()
            return False
        started = time.perf_counter()
        try:
            job.files = self._copies.copy(files)
        except Exception as error:  # an error of this rank: the others learn of it in finish
            job.error = error
            return True
        job.copied_seconds = time.perf_counter() - started
        job.start()
        return True

    def finish(self) -> Saved:
        """Wait for all ranks' files, then make the checkpoint exist.

        Raises CheckpointError on all ranks, with nothing left behind, if the disk refused any of them. Earlier
        checkpoints and `latest` are then unchanged; they also are after a kill at any moment.
        """
        job = self._job
        assert job is not None, "begun"
        job.wait()
        self._copies.release()
        self._job = None
        try:
            with together_on_disk():
                job.raise_error()
            files: dict[str, FileEntry] = {}
            for part in gather_objects(job.entries):
                files |= part
            with together_on_disk():
                reach("save.agreed")
            with together_on_disk():
                if is_main():
                    self._complete(job, files)
        except CheckpointError:
            self._discard(job.partial)
            raise
        seconds = time.perf_counter() - job.began if job.copied_seconds is None else job.written_seconds
        return Saved(folder=job.final, copied_seconds=job.copied_seconds, written_seconds=seconds)

    def abandon(self) -> None:
        """Make the writing thread stop at the next file, for a program that exits without its checkpoint."""
        if self._job is not None:
            self._job.is_abandoned = True

    def require_space(self, *, further_bytes: int, saves_left: int, in_background: bool) -> list[str]:
        """Return lines on how much disk and memory the run's checkpoints need, before anything is trained.

        further_bytes: this rank's files besides the engine's. saves_left: number of checkpoints to come. While one is
        written, the one that it replaces is still there. Raises CheckpointError on all ranks if the disk has no room
        for all checkpoints that will exist at the same time.
        """
        size = self._engine.checkpoint_bytes() + sum(gather_objects(further_bytes))
        kept = self._num_kept
        with together_on_disk():
            if is_main():
                self._check_start(size, saves_left)
        lines = [f"checkpoints: about {gib(size)} GiB each; {kept} are kept, and one more exists while it is written"]
        if in_background:
            own = self._engine.own_checkpoint_bytes() + further_bytes
            most = max(gather_objects(own))
            lines.append(
                f"checkpoints: written in the background from copies of up to {gib(most)} GiB per rank in host memory"
            )
        return lines

    @property
    def _num_kept(self) -> int:
        return self._retention.newest + (self._best is not None)

    def _check_start(self, size: int, saves_left: int) -> None:
        present = len(manifest.checkpoint_folders(self._folder))
        more = min(self._num_kept + 1 - min(present, self._num_kept), max(saves_left, 1))
        self._require_free(more * size, f"{more} more of about {gib(size)} GiB each will exist at the same time")

    def _require_free(self, needed: int, why: str) -> None:
        # a start that is refused here must leave no folder behind
        existing = next(path for path in (self._folder.absolute(), *self._folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise CheckpointError(
                f"no space for a checkpoint in {self._folder}: {why}, and {gib(free)} GiB are free; free some space, "
                "lower cadence.keep_checkpoints, or give another output_dir"
            )

    def _measure(self, files: Sequence[StateFile], *, in_background: bool) -> tuple[bool, int]:
        """Return whether every host has memory for its ranks' copies, and how many bytes all ranks will write."""
        to_allocate = self._copies.bytes_to_allocate(files)
        own = (socket.gethostname(), to_allocate, self._available_bytes(), num_bytes(files))
        needed: dict[str, int] = {}
        available: dict[str, int] = {}
        size = 0
        for host, host_bytes, host_available, file_bytes in gather_objects(own):
            needed[host] = needed.get(host, 0) + host_bytes
            if host_available is not None:
                available[host] = min(available.get(host, host_available), host_available)
            size += file_bytes
        short = [host for host in available if needed[host] > available[host]]
        if short and in_background:
            self._say(
                f"{short[0]} has {gib(available[short[0]])} GiB of memory left, and copies of its ranks' state need "
                f"{gib(needed[short[0]])} GiB: training waits until this checkpoint is written"
            )
        return not short, size

    def _open(self, partial: Path, size: int, first: Callable[[], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for pattern in (f"{PARTIAL_PREFIX}*", f"{DELETED_PREFIX}*", f"step_*{REPLACED_SUFFIX}*"):
            for leftover in self._folder.glob(pattern):  # the leftovers of a killed save
                shutil.rmtree(leftover)
        remove_partials(self._folder)
        first()
        self._require_free(size, f"it needs {gib(size)} GiB")
        partial.mkdir()

    def _denoiser_config(self) -> list[StateFile]:
        if not is_main():
            return []
        module: Any = self._engine.module  # a diffusers model; torch's Module has no config
        config = {name: value for name, value in module.config.items() if not name.startswith("_name")}
        return [
            StateFile(name=DENOISER_CONFIG_NAME, state=json.dumps(config, indent=2, default=list), write=_write_text)
        ]

    def _complete(self, job: WritingJob, files: dict[str, FileEntry]) -> None:
        """Make the checkpoint exist: manifest, rename, `latest`. Only then delete older checkpoints."""
        identity = self._identity
        if not job.renews:  # a folder there could not be used; without it, a manifest completes the new one
            self._move_aside(job.final, DAMAGED_SUFFIX)
        manifest.write_manifest(
            job.partial,
            Manifest(
                step=job.step,
                world_size=identity.world_size,
                stage=identity.stage,
                precision=identity.precision,
                fingerprint=identity.fingerprint,
                layout=self._engine.layout_digest(),
                run=identity.as_saved(),
                files=files,
            ),
        )
        reach("save.manifest")
        replaced = self._move_aside(job.final, REPLACED_SUFFIX) if job.renews else None
        os.replace(job.partial, job.final)
        reach("save.renamed")
        point_latest(job.final)
        reach("save.latest")
        if replaced is not None:
            self._delete(replaced)
        self._prune(newest=job.step)
        reach("save.pruned")

    def _move_aside(self, final: Path, suffix: str) -> Path | None:
        """Move an older folder of the same step away; a damaged one is kept for inspection."""
        if not final.exists():
            return None
        aside = unused_name(final.with_name(final.name + suffix))
        os.replace(final, aside)
        reach("save.moved_old")
        return aside

    def _prune(self, *, newest: int) -> None:
        folders = {manifest.step_of(folder) or 0: folder for folder in manifest.checkpoint_folders(self._folder)}
        best = None if self._best is None else self._best.mark(newest)
        for step in self._retention.to_delete(list(folders), saved=newest, protected=self._protected_step, best=best):
            self._delete(folders[step])

    def _delete(self, folder: Path) -> None:
        """Delete a checkpoint; it is renamed first, so that a kill leaves nothing that looks like a checkpoint."""
        try:
            gone = unused_name(folder.with_name(DELETED_PREFIX + folder.name))
            os.replace(folder, gone)
            shutil.rmtree(gone)
        except OSError as error:
            self._say(f"{folder} is no longer needed, but cannot be deleted: {error}")

    def _discard(self, partial: Path) -> None:
        """Remove the leftovers of a failed save; if the disk refuses that too, the next save tries again."""
        if is_main():
            try:
                shutil.rmtree(partial)
            except FileNotFoundError:
                pass
            except OSError as error:
                self._say(f"{partial}: cannot be removed: {error}")


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
