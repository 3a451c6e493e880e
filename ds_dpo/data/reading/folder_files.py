"""All files below a folder, also behind links to folders, and what the folder's README.md says of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from ds_dpo.config.documents import parse_yaml
from ds_dpo.errors import DataError
from ds_dpo.outside import read_regular

MAX_CARD_BYTES = 4 * 2**20


def files_in(folder: Path, *, below: bool) -> list[PurePath]:
    """Return the paths of files, relative to the folder. below: also those in folders below it.

    Hidden folders, pipes and devices do not count. A folder that two paths lead to counts once, under its own name.
    Raises DataError if the folder cannot be listed.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"{folder} cannot be listed: you have no permission to read it")
    places = _folders(str(folder)) if below else [str(folder)]
    return [PurePath(file).relative_to(folder) for place in places for file in _files(place)]


def _folders(folder: str) -> Iterator[str]:
    """Yield the folder and all below it; links come last, so that a folder is found under its own name."""
    own, links, seen = [folder], list[str](), set[str]()
    while own or links:
        place = own.pop() if own else links.pop(0)
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        yield place
        for entry in _entries(place):
            if entry.is_dir() and not entry.name.startswith("."):
                (links if entry.is_symlink() else own).append(entry.path)


def _files(folder: str) -> Iterator[str]:
    for entry in _entries(folder):
        try:
            is_readable = stat.S_ISREG(entry.stat().st_mode)
        except OSError:
            # a link to nothing: the error comes with the file's name when it is opened
            is_readable = True
        if is_readable:
            yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        # such as lost+found, which only root may list
        return []


def patterns_of_subset(folder: Path, name: str) -> dict[str, list[str]] | None:
    """Return the file patterns of each split that README.md lists for a subset, or None if it lists none."""
    try:
        card = read_regular(folder / "README.md", max_bytes=MAX_CARD_BYTES).decode("utf-8")
        header = parse_yaml(card.split("---")[1]) if card.startswith("---") else None
    except (OSError, ValueError, IndexError):
        return None
    configs = header.get("configs") if isinstance(header, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict) and config.get("config_name") == name and config.get("data_files"):
            return _patterns_by_split(config["data_files"])
    return None


def _patterns_by_split(data_files: Any) -> dict[str, list[str]]:
    """Return the patterns in `data_files` of a card: one pattern, a list of them, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    return patterns
