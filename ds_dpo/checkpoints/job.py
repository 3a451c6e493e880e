"""Write one rank's files of a checkpoint, on this thread or on another one."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_dpo.checkpoints.folder import gib, where
from ds_dpo.errors import CheckpointError
from ds_dpo.process.fault_points import reach
from ds_dpo.storage import manifest
from ds_dpo.storage.manifest import FileEntry
from ds_dpo.storage.state_files import StateFile


@dataclass(kw_only=True)
class WritingJob:
    """This rank's part of one checkpoint. Its error is kept until all ranks can raise it together."""

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
        """Write, sync and hash the files; an error is kept for raise_error."""
        started = time.perf_counter()
        try:
            reach("save.copied")
            self.partial.mkdir(exist_ok=True)  # rank 0 has made it, but this host may not see it yet
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
        """Write on a thread that the program waits for when it exits: torch cannot be interrupted while it writes."""
        self.thread = threading.Thread(target=self.write, name=f"save-step-{self.step}", daemon=False)
        self.thread.start()

    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def raise_error(self) -> None:
        """Raise the error of write, if any: CheckpointError or OSError if disk or memory was short."""
        if self.error is None:
            return
        text = str(self.error)
        if isinstance(self.error, MemoryError) or "DefaultCPUAllocator" in text:
            raise CheckpointError(f"no memory for a copy of the state{where()}: {text}") from self.error
        if isinstance(self.error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
            # torch raises this instead of OSError if the disk accepts only part of a file
            free = shutil.disk_usage(self.final.parent).free
            raise CheckpointError(
                f"the checkpoint could not be written{where()} in {self.final.parent}: a file is incomplete, "
                f"and {gib(free)} GiB are free ({text})"
            ) from self.error
        raise self.error


def _sync_and_hash(path: Path) -> FileEntry:
    """Flush a file to the disk, then read it again for its checksum."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return manifest.hash_file(path)
