"""A folder while it is being made: locked by one process, with a plan that a rerun must agree with."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.record import differences
from ds_dpo.outside import parse_json
from ds_dpo.run_folder.folder import flatten
from ds_dpo.storage.replace import remove_partials, replace_file

LOCK_NAME = ".lock"
WORK_NAME = "work"
PLAN_NAME = "plan.json"


def work_of(out: Path) -> Path:
    """Return the folder inside `out` that exists only until `out` is finished."""
    return out / WORK_NAME


def begin(out: Path, plan: Mapping[str, Any], *, kind: str, subfolders: Sequence[str], is_extension: bool) -> str:
    """Prepare `out` for its units; returns "making", "continuing" or "extending".

    kind: what the folder is, for messages. subfolders: names of the folders to create inside `out`. is_extension: `out`
    is finished and gets more units; its plan follows from its record. Raises ConfigError if `out` holds other files, or
    was begun with another plan.
    """
    work, plan_file = work_of(out), work_of(out) / PLAN_NAME
    if is_extension:
        state = "extending"
    elif plan_file.is_file():
        require_same_plan(out, _read_plan(plan_file), plan, kind=kind)
        state = "continuing"
    else:
        _require_empty(out, kind)
        work.mkdir(exist_ok=True)
        replace_file(plan_file, json.dumps(plan, indent=1), sync=True)
        state = "making"
    for folder in (work, *(out / name for name in subfolders)):
        folder.mkdir(exist_ok=True)
    remove_partials(out, recursive=True)
    return state


def _require_empty(out: Path, kind: str) -> None:
    inside = sorted(path.name for path in out.iterdir() if path.name not in (LOCK_NAME, WORK_NAME))
    if inside:
        raise ConfigError(f"--out {out} holds {inside[0]} and is not an unfinished {kind}; name another folder")


def require_same_plan(out: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, kind: str) -> None:
    """Raise ConfigError that names each part in which two plans of a folder of this kind differ."""
    changes = differences(
        flatten(old), flatten(json.loads(json.dumps(new))), holder=f"the {kind}", asker="this command"
    )
    if changes:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"--out {out} holds a {kind} that was begun with other settings:\n  {listed}\n"
            "restore these settings to continue it, or name another folder"
        )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); remove the folder and start again") from error
    return plan


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock ends with the process, however it ends.

    Raises ConfigError if another process holds it or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        # not flock: forked processes would share it, and still hold it for seconds after this process was killed
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"--out {out}: another process is writing to it; wait until it ends, or name another folder"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
