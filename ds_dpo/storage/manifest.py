"""The manifest of a checkpoint: lists its files, so that a torn or altered checkpoint is never loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ds_dpo.errors import CheckpointError, cut, shown
from ds_dpo.outside import open_regular, parse_json, read_regular
from ds_dpo.storage.replace import remove_partials, replace_file

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
DENOISER_CONFIG_NAME = "denoiser_config.json"
FIRST_DENOISER_CONFIG_NAME = "unet_config.json"  # in checkpoints of earlier versions
STEP_FOLDER = re.compile(r"step_(\d+)")
MAX_BYTES = 8 * 2**20  # 150 bytes a file, and two files a rank
LATEST_BYTES = 4096
NAME_BYTES, MOST_STAGE, MOST_RANKS = 255, 3, 10**6


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hexadecimal SHA-256 of one file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint folder holds, and the state of which run. files: relative name -> entry.

    layout: equal for checkpoints whose shards hold the same parts of the same weights. run: what identifies the run, by
    kind (config, models ...) and name. Both are None if an earlier version wrote the checkpoint.
    """

    step: int
    world_size: int
    stage: int
    precision: str
    fingerprint: str
    files: dict[str, FileEntry]
    layout: str | None = None
    run: dict[str, dict[str, Any]] | None = None
    format: int = MANIFEST_FORMAT

    def as_json(self) -> dict[str, Any]:
        """Return what manifest.json holds."""
        fields = dataclasses.asdict(self)
        if self.run is None:
            del fields["run"]
        return fields


def step_folder_name(step: int) -> str:
    """Return the name of a step's checkpoint folder, such as step_00000200."""
    return f"step_{step:08d}"


def tag_in(latest: Path) -> str:
    """Return the name of the folder that a file `latest` states. Raises CheckpointError if it cannot be read."""
    try:
        return read_regular(latest, max_bytes=LATEST_BYTES).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{latest}: cannot be read (it is not UTF-8 text)") from error
    except OSError as error:
        raise CheckpointError(f"{latest}: cannot be read ({error.strerror})") from error


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None for any other name."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def hash_file(path: Path) -> FileEntry:
    """Return size and SHA-256 of a file, read in pieces. Raises CheckpointError if it cannot be read."""
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256")
            return FileEntry(size=file.tell(), sha256=digest.hexdigest())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write folder/manifest.json and sync it; it is written after all other files of a checkpoint.

    Raises CheckpointError if it cannot be written.
    """
    path = folder / MANIFEST_NAME
    try:
        remove_partials(folder)
        replace_file(path, json.dumps(manifest.as_json(), indent=1, sort_keys=True), sync=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def read_manifest(folder: Path) -> Manifest:
    """Read folder/manifest.json, without looking at the files. Raises CheckpointError that says what is wrong."""
    path = folder / MANIFEST_NAME
    try:
        fields = parse_json(read_regular(path, max_bytes=MAX_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}, so the checkpoint was never completed") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else cut(str(error))
        raise CheckpointError(f"{path}: not readable as JSON ({reason})") from error
    with _malformed(path):
        manifest = _parse(fields)
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(
            f"{path}: says that it is step {shown(manifest.step)}, but its folder is {folder.name}; one of them was "
            "altered"
        )
    return manifest


def _parse(fields: dict[str, Any]) -> Manifest:
    if fields["format"] != MANIFEST_FORMAT:
        raise ValueError(f"format {shown(fields['format'])}, this version reads {MANIFEST_FORMAT}")
    files = {
        str(name): FileEntry(_number(entry, "size", at_least=0), str(entry["sha256"]))
        for name, entry in fields["files"].items()
    }
    # a manifest is an untrusted file too: it must not lead the reader out of its folder
    outside = [name for name in files if leads_outside(name) or len(name.encode("utf-8", "replace")) > NAME_BYTES]
    if outside:
        raise ValueError(f"file {shown(outside[0])} is outside of the checkpoint, or no name of a file")
    if not files:
        raise ValueError("it lists no file")
    return Manifest(
        step=_number(fields, "step", at_least=0),
        world_size=_number(fields, "world_size", at_least=1, at_most=MOST_RANKS),
        stage=_number(fields, "stage", at_least=0, at_most=MOST_STAGE),
        precision=str(fields["precision"]),
        fingerprint=str(fields["fingerprint"]),
        layout=None if fields.get("layout") is None else str(fields["layout"]),
        run=None if fields.get("run") is None else {kind: dict(named) for kind, named in fields["run"].items()},
        files=files,
    )


def _number(fields: dict[str, Any], name: str, *, at_least: int, at_most: int = 2**63) -> int:
    value = fields[name]
    if type(value) is not int or not at_least <= value <= at_most:
        raise ValueError(f"{name} is {shown(value)}, not a whole number from {at_least} to {at_most}")
    return value


def leads_outside(name: str) -> bool:
    """Whether a name that a file states as relative to its folder could lead out of the folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


@contextlib.contextmanager
def _malformed(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a manifest of this project ({cut(str(error), characters=400)})") from error


def verify_manifest(folder: Path, *, names: Iterable[str] | None = None, checksums: bool = True) -> Manifest:
    """Read the manifest and compare the files with it.

    names: the files to check (a rank verifies its own). None checks all of them, and refuses shards that the manifest
    does not list. checksums: False compares names and sizes only, and reads no file. Raises CheckpointError that names
    the first file that is missing, not listed, or of another size or content.
    """
    manifest = read_manifest(folder)
    if names is None:
        unknown = sorted({path.name for path in folder.glob("*.pt")} - manifest.files.keys())
        if unknown:
            raise CheckpointError(f"{folder / unknown[0]}: not in the manifest; left over from another checkpoint?")
    for name in sorted(manifest.files if names is None else names):
        if name not in manifest.files:
            raise CheckpointError(f"{folder / name}: not in the manifest")
        _verify_file(folder / name, manifest.files[name], checksums=checksums)
    return manifest


def _verify_file(path: Path, expected: FileEntry, *, checksums: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, but listed in the manifest")
    if path.stat().st_size != expected.size:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {expected.size}")
    if checksums and hash_file(path).sha256 != expected.sha256:
        raise CheckpointError(f"{path}: content differs from the manifest's SHA-256; the file is damaged or altered")


def checkpoint_folders(checkpoints_dir: Path) -> list[Path]:
    """Return the folders named step_N in a run's checkpoints folder, newest first."""
    if not checkpoints_dir.is_dir():
        return []
    found = [path for path in checkpoints_dir.iterdir() if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def newest_valid_checkpoint(
    checkpoints_dir: Path, *, checksums: bool = True
) -> tuple[Path | None, list[CheckpointError]]:
    """Return the newest step folder whose manifest verifies, and the reason for each newer one that does not.

    (None, []) means that there is no checkpoint at all, and (None, reasons) that all are damaged.
    """
    reasons: list[CheckpointError] = []
    for folder in checkpoint_folders(checkpoints_dir):
        try:
            verify_manifest(folder, checksums=checksums)
        except CheckpointError as reason:
            reasons.append(reason)
        else:
            return folder, reasons
    return None, reasons
