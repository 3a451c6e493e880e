"""Read checkpoints: the newest one that verifies on all ranks, or an error."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.checkpoints.folder import LATEST, point_latest, rank_of, recover_interrupted, together_on_disk, unused_name
from ds_dpo.checkpoints.harmless import require_harmless, require_listed
from ds_dpo.checkpoints.identity import RunIdentity, none_usable
from ds_dpo.distributed.collectives import broadcast_object, gather_objects, is_main, rank, world_size
from ds_dpo.distributed.together import said_once
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import CheckpointError, shown
from ds_dpo.process.fault_points import reach
from ds_dpo.process.say import Say
from ds_dpo.storage import manifest
from ds_dpo.storage.replace import sync_folder

ROLLED_BACK_SUFFIX = ".rolled_back"


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """The folder of a checkpoint, and the plain values that were saved in it."""

    folder: Path
    client_state: dict[str, Any]


class CheckpointStore:
    """The checkpoints folder of one run; all ranks call every method together."""

    def __init__(self, folder: Path, *, engine: Engine, identity: RunIdentity, say: Say) -> None:
        """say: takes a line for each problem that was found, and what was done about it."""
        self.folder = folder
        self._say = say
        self._engine = engine
        self._identity = identity

    def set_aside_after(self, step: int) -> bool:
        """Rename all checkpoints after a step, so that none of them is loaded again.

        Returns False, and does nothing, if no checkpoint of that step or before exists. Raises CheckpointError on all
        ranks.
        """
        names = broadcast_object([path.name for path in manifest.checkpoint_folders(self.folder)])
        later = [name for name in names if (manifest.step_of(Path(name)) or 0) > step]
        if len(later) == len(names):
            return False
        with together_on_disk():
            if is_main():
                self._set_aside(later)
        return True

    def go_back_to(self, step: int) -> None:
        """Set all checkpoints after a step aside, and make `latest` name that of the step.

        Raises CheckpointError on all ranks.
        """
        before = set(broadcast_object([path.name for path in manifest.checkpoint_folders(self.folder)]))
        self.set_aside_after(step)
        with together_on_disk():
            if is_main():
                point_latest(self.folder / manifest.step_folder_name(step))
        for name in sorted(before - set(broadcast_object([p.name for p in manifest.checkpoint_folders(self.folder)]))):
            self._say(f"set aside: {self.folder / name} is now {name}{ROLLED_BACK_SUFFIX}, and no start loads it")

    def _set_aside(self, names: Sequence[str]) -> None:
        for name in names:
            os.replace(self.folder / name, unused_name(self.folder / f"{name}{ROLLED_BACK_SUFFIX}"))
        sync_folder(self.folder)

    def load_newest(self) -> LoadedCheckpoint | None:
        """Load the newest checkpoint that verifies, saved by any number of ranks and ZeRO stage; None without one.

        A checkpoint whose save was interrupted between its renames gets its name first. Raises CheckpointError if there
        are checkpoints, or a `latest`, and none can be used: training never silently starts again.
        """
        return self._load(None)

    def load_step(self, step: int) -> LoadedCheckpoint:
        """Load the checkpoint of a step. Raises CheckpointError on all ranks if it cannot be used."""
        found = self._load(step)
        if found is None:
            raise said_once(CheckpointError(f"{self.folder} has no checkpoint of step {step}"))
        return found

    def _load(self, step: int | None) -> LoadedCheckpoint | None:
        """Load the newest checkpoint that verifies, of one step if it is given."""
        reach("load.begin")
        with together_on_disk():
            if is_main():
                recover_interrupted(self.folder, self._say)
        folders = [path for path in manifest.checkpoint_folders(self.folder) if step in (None, manifest.step_of(path))]
        names = broadcast_object([path.name for path in folders])
        reasons: list[str] = []
        for name in names:
            errors = [error for error in gather_objects(self._verify(self.folder / name)) if error is not None]
            if not errors:
                reach("load.verified")
                folder = self.folder / name
                client_state = self._read(folder)
                errors = [error for error in gather_objects(_step_problem(folder, client_state)) if error is not None]
            if not errors:
                reach("load.read")
                return LoadedCheckpoint(folder=folder, client_state=client_state)
            reasons.append(str(errors[0]))
            self._say(f"skipped: {errors[0]}")
        latest = self.folder / LATEST
        if reasons:
            raise said_once(none_usable(self.folder, reasons))
        problem = broadcast_object(_nothing_behind(latest) if step is None and is_main() else None)
        if problem is not None:
            raise said_once(CheckpointError(problem))
        return None

    def _verify(self, folder: Path) -> CheckpointError | None:
        """Check the manifest against this run, and this rank's files against the manifest; none may run code."""
        try:
            found = manifest.read_manifest(folder)
            self._identity.require_own(folder, found)
            own = [name for name in found.files if _verifying_rank(name, world_size=world_size()) == rank()]
            manifest.verify_manifest(folder, names=own)
            require_listed(folder, found)
            require_harmless(folder, own)
        except CheckpointError as error:
            return error
        return None

    def _read(self, folder: Path) -> dict[str, Any]:
        """Read a verified checkpoint into the engine; DeepSpeed does this if each rank has its own shard in it."""
        found, own = manifest.read_manifest(folder), self._identity
        is_cut_alike = (found.world_size, found.stage) == (own.world_size, own.stage)
        if is_cut_alike and found.layout in (None, self._engine.layout_digest()):
            return self._engine.read_checkpoint(folder)
        start = time.perf_counter()
        client_state = self._engine.read_checkpoint_of_other_layout(folder)
        saved, has = (f"{by.world_size} rank(s) at ZeRO stage {by.stage}" for by in (found, own))
        how = "other DeepSpeed settings" if is_cut_alike else has
        self._say(
            f"{folder} was saved by {saved}, but this start has {how}: the state was read tensor by tensor in "
            f"{time.perf_counter() - start:.1f} s"
        )
        return client_state


def _step_problem(folder: Path, client_state: dict[str, Any]) -> CheckpointError | None:
    """Return what is wrong if the state that a checkpoint holds is not of the step that its manifest states.

    The manifest lists the checksum of the state, so both were altered, or the step alone was.
    """
    stated = manifest.read_manifest(folder).step
    held = client_state.get("step", stated)
    if stated == held:
        return None
    return CheckpointError(
        f"{folder}: its {manifest.MANIFEST_NAME} says that it is step {stated}, but the state in it is of step "
        f"{shown(held)}; one of them was altered"
    )


def _nothing_behind(latest: Path) -> str | None:
    """Return what to do about a `latest` in a folder without checkpoints; None if there is none, as in a new run."""
    if not os.path.lexists(latest):
        return None
    try:
        found = f"{latest} names {shown(manifest.tag_in(latest))}"
    except CheckpointError as error:
        found = str(error)
    return f"{found}, but {latest.parent} holds no checkpoint; restore it, or start a new run with another output_dir"


def _verifying_rank(name: str, *, world_size: int) -> int:
    """Return the rank of this start that verifies a file; any number of ranks may have written the files."""
    return rank_of(name) % world_size
