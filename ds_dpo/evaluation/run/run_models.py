"""Models that are runs of training: a checkpoint of theirs is exported once, into the evaluation's folder."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ds_dpo.errors import CheckpointError
from ds_dpo.evaluation.drawing.generate import file_name
from ds_dpo.evaluation.drawing.model_folder import EXPORT_RECORD_NAME
from ds_dpo.precision import Precision
from ds_dpo.process.say import Say
from ds_dpo.storage.best_mark import BEST, read_best_mark
from ds_dpo.storage.manifest import MANIFEST_NAME, checkpoint_folders, step_folder_name, step_of, verify_manifest
from ds_dpo.storage.replace import PARTIAL_SUFFIX

MODELS_NAME = "models"
RUN_AT_STEP = re.compile(r"(?P<run>.+)@(?P<step>best|[0-9]{1,18})")
DIGITS = 10
# Writes a diffusers pipeline of a checkpoint folder to a folder. The package `export` does it, which is beside
# `evaluation`; the command passes it.
Exporter = Callable[[Path, Path, Precision], None]


def is_run(name: str) -> bool:
    """Return whether a model's name is a run folder, one of its checkpoints, RUN@STEP, or RUN@best."""
    match = RUN_AT_STEP.fullmatch(name)
    folder = Path(name)
    if match is not None and not folder.exists():
        return _checkpoints_of(Path(match["run"])) is not None
    return (folder / MANIFEST_NAME).is_file() or _checkpoints_of(folder) is not None


def export_runs(names: Iterable[str], out: Path, dtype: Precision, export: Exporter, *, say: Say) -> dict[str, str]:
    """Return the folder of the exported pipeline for each name that is a run; those of an earlier call are taken again.

    Raises CheckpointError for a run without such a checkpoint, or one that cannot be exported.
    """
    for unfinished in (out / MODELS_NAME).glob(f".*{PARTIAL_SUFFIX}"):  # an export that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    exported = {}
    for name in dict.fromkeys(filter(is_run, names)):
        checkpoint = _checkpoint_of(name, out, dtype, say=say)
        folder = _export_of(checkpoint, out, dtype)
        if not _is_complete(folder):
            say(f"{name}: exporting {checkpoint.name} to {folder}")
            export(checkpoint, folder, dtype)
        exported[name] = str(folder)
    return exported


def _checkpoint_of(name: str, out: Path, dtype: Precision, *, say: Say) -> Path:
    match = RUN_AT_STEP.fullmatch(name)
    if match is None or Path(name).exists():
        folder = Path(name)
        return folder if (folder / MANIFEST_NAME).is_file() else _newest(folder, out, dtype, say=say)
    checkpoints = _checkpoints_of(Path(match["run"]))
    assert checkpoints is not None, "is_run found it"
    step = read_best_mark(checkpoints).step if match["step"] == BEST else int(match["step"])
    folder = checkpoints / step_folder_name(step)
    if not folder.is_dir():
        steps = sorted(step_of(each) or 0 for each in checkpoint_folders(checkpoints))
        raise CheckpointError(f"{name}: has no checkpoint of step {step}, only of {steps}")
    return folder


def _newest(run: Path, out: Path, dtype: Precision, *, say: Say) -> Path:
    """Return the newest checkpoint whose manifest verifies; one that is exported was verified then."""
    checkpoints = _checkpoints_of(run)
    assert checkpoints is not None, "is_run found it"
    for folder in checkpoint_folders(checkpoints):
        try:
            if not _is_complete(_export_of(folder, out, dtype)):
                verify_manifest(folder)
        except CheckpointError as reason:
            say(f"skipped: {reason}")
        else:
            return folder
    raise CheckpointError(f"{run}: has no valid checkpoint")


def _checkpoints_of(run: Path) -> Path | None:
    checkpoints = run / "checkpoints"
    return checkpoints if checkpoint_folders(checkpoints) else None


def _export_of(checkpoint: Path, out: Path, dtype: Precision) -> Path:
    """Return where a checkpoint is exported to, named by its manifest, which has the checksums of its files."""
    try:
        content = (checkpoint / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: has no manifest ({error.strerror}), so it is not complete") from error
    digest = hashlib.sha256(content + dtype.encode()).hexdigest()[:DIGITS]
    run = checkpoint.resolve().parent.parent.name
    return out / MODELS_NAME / f"{file_name(run)}-{checkpoint.name}-{digest}"


def _is_complete(folder: Path) -> bool:
    return (folder / EXPORT_RECORD_NAME).is_file()
