"""Checkpoints that exist or do not: written aside, synced, hashed, agreed on, renamed; read only when they verify."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as partial_call
from pathlib import Path
from typing import Any, TypeVar

from ds_dpo import manifest
from ds_dpo.distributed import broadcast_object, gather_objects, is_main, raise_together, rank
from ds_dpo.engine import Engine
from ds_dpo.errors import CheckpointError
from ds_dpo.fault_points import reach
from ds_dpo.manifest import FileEntry, Manifest

LATEST = "latest"
PARTIAL_PREFIX = "partial_"
ROLLED_BACK_SUFFIX = ".rolled_back"
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
class LoadedCheckpoint:
    """Where a checkpoint lies, and the plain values that it was saved with."""

    folder: Path
    client_state: dict[str, Any]


class CheckpointStore:
    """The checkpoints folder of one run; every method is called by all ranks together."""

    def __init__(
        self, folder: Path, *, engine: Engine, identity: RunIdentity, keep: int, report: Callable[[str], None]
    ) -> None:
        """keep: how many checkpoints stay; older ones are deleted once a newer one is complete.

        report: says what was found amiss and how it was dealt with.
        """
        self._folder = folder
        self._report = report
        self._engine = engine
        self._identity = identity
        self._keep = keep
        self._protected_step: int | None = None

    def protect(self, step: int | None) -> None:
        """Keep the newest checkpoint of this step or before beside the newest ones, until told otherwise."""
        self._protected_step = step

    def set_aside_after(self, step: int) -> bool:
        """Rename all checkpoints after a step, so that none is ever resumed from.

        Returns False, and does nothing, where there is none of that step or before. Raises CheckpointError on all ranks
        together.
        """
        found = broadcast_object([path.name for path in manifest.checkpoint_folders(self._folder)])
        names = [str(name) for name in found]  # type: ignore[attr-defined]
        later = [name for name in names if (manifest.step_of(Path(name)) or 0) > step]
        if len(later) == len(names):
            return False
        _together(lambda: self._set_aside(later), when=is_main())
        return True

    def _set_aside(self, names: Sequence[str]) -> None:
        for name in names:
            os.replace(self._folder / name, _unused_name(self._folder / f"{name}{ROLLED_BACK_SUFFIX}"))
        manifest.sync_folder(self._folder)

    def save(
        self,
        *,
        step: int,
        client_state: Mapping[str, Any],
        writers: Sequence[Callable[[Path], None]] = (),
        renews: bool = False,
    ) -> Path:
        """Write the checkpoint of a step and return its folder. Raises CheckpointError on all ranks together.

        writers: put further files into the folder that they are given, called by all ranks; a file whose name does not
        tell its rank is rank 0's. renews: one of the same step, loaded just now, is replaced for good. A kill at any
        moment leaves the earlier checkpoints and `latest` as they were.
        """
        final = self._folder / manifest.step_folder_name(step)
        partial = self._folder / (PARTIAL_PREFIX + final.name)
        _together(lambda: reach("save.begin"))
        _together(lambda: self._clear_leftovers(), when=is_main())
        self.require_space()
        _together(lambda: reach("save.copied"))
        _together(lambda: reach("save.write"))
        _together(lambda: self._write_shards(partial, client_state))
        for write in writers:
            _together(partial_call(write, partial))
        _together(lambda: self._write_unet_config(partial), when=is_main())
        _together(lambda: reach("save.written"))
        entries = _together(lambda: _sync_and_hash(_own_files(partial)))
        _together(lambda: reach("save.hashed"))
        files: dict[str, FileEntry] = {}
        for part in gather_objects(entries):
            assert isinstance(part, dict)
            files |= part
        _together(lambda: reach("save.agreed"))
        _together(lambda: self._complete(partial, final, step=step, files=files, renews=renews), when=is_main())
        return final

    def load_newest(self) -> LoadedCheckpoint | None:
        """Load the newest checkpoint that verifies; None where none was ever saved.

        Raises CheckpointError where there are checkpoints or a `latest` and none can be used: training never starts
        over in silence.
        """
        reach("load.begin")
        found = broadcast_object([path.name for path in manifest.checkpoint_folders(self._folder)])
        names = [str(name) for name in found]  # type: ignore[attr-defined]
        reasons: list[str] = []
        for name in names:
            errors = [error for error in gather_objects(self._verify(self._folder / name)) if error is not None]
            if not errors:
                reach("load.verified")
                folder = self._folder / name
                client_state = self._engine.read_checkpoint(folder)
                reach("load.read")
                return LoadedCheckpoint(folder=folder, client_state=client_state)
            reasons.append(str(errors[0]))
            self._report(f"passed over: {errors[0]}")
        latest = self._folder / LATEST
        if reasons:
            raise CheckpointError(f"no checkpoint in {self._folder} can be used: " + "; ".join(reasons))
        if broadcast_object(latest.exists()):
            named = latest.read_text(encoding="utf-8").strip()
            raise CheckpointError(
                f"{latest} names {named!r}, but {self._folder} holds no checkpoint; restore it, or give another "
                "output_dir to start anew"
            )
        return None

    def _verify(self, folder: Path) -> CheckpointError | None:
        """Check the manifest against this run and this rank's files against the manifest."""
        try:
            found = manifest.read_manifest(folder)
            self._require_same_layout(folder, found)
            manifest.verify_manifest(folder, names=[name for name in found.files if _rank_of(name) == rank()])
        except CheckpointError as error:
            return error
        return None

    def _require_same_layout(self, folder: Path, found: Manifest) -> None:
        for field in ("world_size", "stage", "precision"):
            old, new = getattr(found, field), getattr(self._identity, field)
            if old != new:
                raise CheckpointError(
                    f"{folder} was saved with {field} {old} and this start has {new}; its shards fit {old} only"
                )

    def require_space(self) -> None:
        """Raise CheckpointError on all ranks together where the disk has no room for one more checkpoint."""
        _together(self._check_space, when=is_main())

    def _check_space(self) -> None:
        # a start that is refused here leaves no folder behind
        existing = next(path for path in (self._folder.absolute(), *self._folder.absolute().parents) if path.exists())
        needed, free = self._engine.checkpoint_bytes(), shutil.disk_usage(existing).free
        if free < needed:
            raise CheckpointError(
                f"no space for a checkpoint in {self._folder}: one of this run takes about {needed / 2**30:.3g} GiB "
                f"and {free / 2**30:.3g} GiB are free; free some, lower cadence.keep_checkpoints, or give another "
                "output_dir"
            )

    def _clear_leftovers(self) -> None:
        """Remove what a killed save left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(PARTIAL_PREFIX + "*"):
            shutil.rmtree(leftover)

    def _write_shards(self, partial: Path, client_state: Mapping[str, Any]) -> None:
        try:
            self._engine.write_checkpoint(partial, client_state=client_state)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            # torch says this, and no OSError, where the disk takes only part of a file
            free = shutil.disk_usage(self._folder).free
            raise CheckpointError(
                f"the checkpoint could not be written in {self._folder}: a file was cut short, {free / 2**30:.3g} GiB "
                f"are free; earlier checkpoints are as they were ({error})"
            ) from error

    def _write_unet_config(self, partial: Path) -> None:
        module: Any = self._engine.module  # a diffusers model, whose config torch's Module does not know
        config = {name: value for name, value in module.config.items() if not name.startswith("_name")}
        (partial / UNET_CONFIG).write_text(json.dumps(config, indent=2, default=list), encoding="utf-8")

    def _complete(self, partial: Path, final: Path, *, step: int, files: dict[str, FileEntry], renews: bool) -> None:
        """Make the checkpoint exist: manifest, rename, `latest`; only then delete older ones."""
        manifest.write_manifest(
            partial,
            Manifest(
                step=step,
                world_size=self._identity.world_size,
                stage=self._identity.stage,
                precision=self._identity.precision,
                fingerprint=self._identity.fingerprint,
                files=files,
            ),
        )
        reach("save.manifest")
        replaced: Path | None = None
        if final.exists():  # a damaged one of the same step: kept aside for whoever wants to look
            suffix = ".replaced" if renews else ".damaged"
            replaced = _unused_name(final.with_name(final.name + suffix))
            os.replace(final, replaced)
            reach("save.moved_old")
        os.replace(partial, final)
        reach("save.renamed")
        temporary = self._folder / f"{LATEST}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(final.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / LATEST)
        manifest.sync_folder(self._folder)
        reach("save.latest")
        if renews and replaced is not None:
            shutil.rmtree(replaced)
        self._prune(newest=step)
        reach("save.pruned")

    def _prune(self, *, newest: int) -> None:
        """Delete all but the newest `keep`; a later one that was passed over at the start does not count as newer."""
        steps = [(manifest.step_of(folder) or 0, folder) for folder in manifest.checkpoint_folders(self._folder)]
        older = [(step, folder) for step, folder in steps if step <= newest]
        reachable = [step for step, _ in older if self._protected_step is not None and step <= self._protected_step]
        for step, folder in older[self._keep :]:
            if step not in reachable[:1]:
                shutil.rmtree(folder)


Result = TypeVar("Result")


def _together(action: Callable[[], Result], *, when: bool = True) -> Result | None:
    """Do a rank's part, then let every rank know if one of them failed; a refusing disk is a CheckpointError."""
    result, error = None, None
    if when:
        try:
            result = action()
        except CheckpointError as caught:
            error = caught
        except OSError as caught:
            error = CheckpointError(f"the checkpoint could not be written: {caught}")
    raise_together(error)
    return result


def _rank_of(name: str) -> int:
    """The rank that wrote a file: the shards name theirs, all else is rank 0's."""
    match = _RANK_OF_FILE.search(name)
    return int(match[1]) if match else 0


def _own_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and _rank_of(path.name) == rank()]


def _sync_and_hash(paths: Iterable[Path]) -> dict[str, FileEntry]:
    """Put files on the disk for good, then read them back for their checksums."""
    entries = {}
    for path in paths:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        entries[path.name] = manifest.hash_file(path)
    return entries


def _unused_name(path: Path) -> Path:
    tries = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in tries if not other.exists())
