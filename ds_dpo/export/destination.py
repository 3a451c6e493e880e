"""Write a folder or file that appears complete or not at all, and that only replaces an earlier export."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_dpo.errors import CheckpointError
from ds_dpo.outside import parse_json
from ds_dpo.storage.replace import partial_path, replacing

RECORD_NAME = "export.json"
RECORD_KEY = "ds_dpo.export"  # in a safetensors file's metadata


@contextlib.contextmanager
def new_folder(out: Path, *, needed_bytes: int, record: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to fill. At the end it is renamed to out; after an error it is removed.

    An earlier export at out is replaced only at the end. record: written to out/export.json with the list of files, so
    that a later export knows what it may replace.
    Raises CheckpointError if out holds anything else, or if the disk is too small or cannot be written.
    """
    check_replaceable(out)
    temporary = partial_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out.parent, needed_bytes=needed_bytes)
        temporary.mkdir()
        yield temporary
        _write_record(temporary, record)
        _put_in_place(temporary, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield the path of a temporary file to write. At the end it is renamed to out; after an error it is removed.

    The file must have the record of the export in its metadata, so that a later export knows that it may replace it.
    Raises CheckpointError if out is anything else, or if the disk is too small or cannot be written.
    """
    check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out.parent, needed_bytes=needed_bytes)
        with replacing(out, sync=False) as temporary:
            yield temporary
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from error


def check_replaceable(out: Path) -> None:
    """Raise CheckpointError unless out is absent, empty, or an earlier export to which nothing was added."""
    if out.is_file():
        _check_replaceable_file(out)
        return
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RECORD_NAME).is_file():
        raise CheckpointError(f"{out}: exists and is not an earlier export; give another folder, or remove it first")
    try:
        own = set(parse_json((out / RECORD_NAME).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{out / RECORD_NAME}: not the record of an export ({error})") from error
    added = sorted(set(_files(out)) - own - {RECORD_NAME})
    if added:
        raise CheckpointError(
            f"{out}: an earlier export to which {added[0]!r} was added; move that file away, or give another folder"
        )


def _check_replaceable_file(out: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(out, framework="pt") as file:
            is_export = RECORD_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):  # any other file is not an export
        is_export = False
    if not is_export:
        raise CheckpointError(f"{out}: exists and is not an earlier export; give another file, or remove it first")


def check_space(folder: Path, *, needed_bytes: int) -> None:
    """Raise CheckpointError unless the disk of this folder has needed_bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder}: {free / 1e9:.2f} GB are free, but the export needs {needed_bytes / 1e9:.2f} GB; "
            "free some space, or give a folder on another disk"
        )


def check_room(out: Path, *, needed_bytes: int) -> None:
    """Check as check_space does for out, which need not exist, nor the folders around it."""
    check_space(next(folder for folder in out.absolute().parents if folder.is_dir()), needed_bytes=needed_bytes)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    content = {**record, "files": _files(folder)}
    (folder / RECORD_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _put_in_place(temporary: Path, out: Path) -> None:
    if not out.exists():
        temporary.rename(out)
        return
    # rename cannot replace a folder with files, so the former export is moved away first
    former = out.with_name(f".{out.name}.{os.getpid()}.former")
    out.rename(former)
    temporary.rename(out)
    shutil.rmtree(former)
