"""Whether a run can write into its folder: asked before anything is loaded, and nothing is left behind."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from ds_dpo.errors import ConfigError

FOLDERS = ("checkpoints", "tensorboard", "samples", "samples/reference", "evaluation", "stacks", "non_finite")
FILES = (
    *("config.yaml", "deepspeed.json", "environment.json", "log.txt"),
    *("metrics.jsonl", "trackers.json", "evaluation/held_out.jsonl", "evaluation/validation.jsonl"),
)


def require_usable(folder: Path) -> None:
    """Raise ConfigError unless files can be made in a run folder, or the folder in the nearest one that exists."""
    whole = folder.absolute()
    nearest = next(path for path in (whole, *whole.parents) if os.path.lexists(path))
    _require_folder(nearest, folder)
    for name in FOLDERS:
        if os.path.lexists(whole / name):
            _require_folder(whole / name, folder)
    for name in FILES:
        if os.path.lexists(whole / name):
            _require_file(whole / name, folder)


def _require_folder(place: Path, folder: Path) -> None:
    if not place.is_dir():
        raise _refusal(folder, place, f"is {_kind(place)}, not a folder")
    try:
        # without a name where the file system can do that, so that nobody sees it
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _refusal(folder, place, f"cannot be written ({error.strerror})") from error


def _require_file(path: Path, folder: Path) -> None:
    if not path.is_file():
        raise _refusal(folder, path, f"is {_kind(path)}, not a file")
    if not os.access(path, os.W_OK):
        raise _refusal(folder, path, "cannot be written (Permission denied)")


def _refusal(folder: Path, place: Path, why: str) -> ConfigError:
    return ConfigError(f"output_dir {str(folder)!r}: {place} {why}; give a folder that this user can write or make")


def _kind(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link that leads nowhere"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a device or a pipe"
