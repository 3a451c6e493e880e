"""The record of a finished folder: JSON, written last, that lists every other file with its size and SHA-256."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from ds_dpo.errors import ConfigError, DataError
from ds_dpo.outside import parse_json
from ds_dpo.storage.manifest import FileEntry
from ds_dpo.storage.replace import replace_file

SOFTWARE = ("ds_dpo", "torch", "diffusers", "transformers", "pillow")


class RecordPart(BaseModel):
    """A record, or a part of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Record = TypeVar("Record", bound=RecordPart)


def software_versions() -> dict[str, str]:
    """Return the versions of the packages that stored values depend on."""
    return {name: version(name) for name in SOFTWARE}


def read_record_file(path: Path, kind: type[Record], *, format_version: int, state_without: str) -> Record:
    """Read a record.

    format_version: the value that its field `format` must have. state_without: what the error says about a folder
    without the file, such as "is not a cache".
    Raises DataError if the file is missing, is not JSON, has another format, or does not hold what `kind` says.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent} has no {path.name}, so it {state_without}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != format_version:
        raise DataError(f"{path}: format {found!r}, this version reads {format_version}; make the cache again")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: not the record of a cache ({where}: {first['msg']})") from None


def write_record_file(path: Path, record: RecordPart) -> None:
    """Write a record and sync it to the disk: from then on its folder is finished."""
    replace_file(path, record.model_dump_json(indent=1) + "\n", sync=True)


def write_rows(path: Path, rows: NDArray[np.void]) -> FileEntry:
    """Write rows of a fixed size as a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows, version=(1, 0), allow_pickle=False)
    content = buffer.getvalue()
    replace_file(path, content, sync=True)
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def check_sizes(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise DataError that names the first file of a record that is missing or has another size."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing, but the cache's record lists it")
        size = path.stat().st_size
        if size != expected.size:
            raise DataError(
                f"{path}: {size} bytes, the cache's record says {expected.size}; it was cut short or altered"
            )


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, asker: str, holder: str = "the cache"
) -> list[str]:
    """Return a line for each name whose found value is not the wanted one. asker, holder: who wants and has it."""
    names = [*wanted, *(name for name in found if name not in wanted)]
    return [
        f"{name}: {holder} has {found.get(name, '(nothing)')}, {asker} {wanted.get(name, '(nothing)')}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def refuse_if_stale(field: str, folder: Path, changes: Sequence[str], *, why: str, program: str) -> None:
    """Raise ConfigError if there are changes: differences between a cache and what a run needs.

    field: the field of the configuration that names the folder. program: the program that makes such a cache.
    """
    if changes:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"{field} {folder} is stale: {why}:\n  {listed}\n"
            f"make it again with {program} and this configuration, in another folder, or restore the old settings"
        )
