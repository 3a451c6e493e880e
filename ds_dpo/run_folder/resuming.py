"""Which checkpoint a start goes on from, as --resume says; asked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ds_dpo.errors import ConfigError
from ds_dpo.storage.manifest import checkpoint_folders, step_folder_name, step_of

Resume = int | Literal["never"] | None  # a step, or never; None: the newest valid checkpoint
NUM_NAMED = 8


def require_resumable(checkpoints: Path, resume: Resume, *, max_train_steps: int) -> None:
    """Raise ConfigError for a checkpoint that is not there or leaves no step, or if there are some and none may be."""
    steps = [step_of(folder) or 0 for folder in checkpoint_folders(checkpoints)]
    if resume == "never" and steps:
        raise ConfigError(
            f"--resume never, but {checkpoints} has checkpoints, the newest of step {steps[0]}: leave --resume out "
            "to go on from it, or give another output_dir"
        )
    if isinstance(resume, int) and resume not in steps:
        listed = ", ".join(map(str, steps[:NUM_NAMED])) + (" and older ones" if len(steps) > NUM_NAMED else "")
        raise ConfigError(
            f"--resume {resume}: {checkpoints} has no {step_folder_name(resume)}; it has "
            + (f"steps {listed}" if steps else "no checkpoint at all")
        )
    if isinstance(resume, int) and resume >= max_train_steps:
        raise ConfigError(
            f"--resume {resume}: max_train_steps {max_train_steps} leaves no step to train after it; give more steps, "
            "or an earlier checkpoint"
        )
