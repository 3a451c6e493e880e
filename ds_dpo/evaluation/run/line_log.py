"""Files of JSON lines that ranks append to, one each, and that a kill leaves readable: what was done stays done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError
from ds_dpo.outside import open_regular, parse_json
from ds_dpo.process.say import Say
from ds_dpo.storage.line_file import LineFile

PATTERN = "rank_*.jsonl"
Line = Mapping[str, Any]


class LineLog:
    """This rank's file in a folder. It is made with the first lines."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._path = folder / f"rank_{rank:05d}.jsonl"
        self._file: LineFile | None = None

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines in one piece, so that a kill leaves all of them or a part of one that is read as none.

        Raises ConfigError if the file cannot be written.
        """
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = LineFile(self._path)
            self._file.write("".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines))
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Bring all lines to the disk. Raises ConfigError if the disk refuses them."""
        if self._file is None:
            return
        try:
            self._file.sync()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}") from error
        self._file.close()
        self._file = None


def read_lines(folder: Path, *, needs: Sequence[str], say: Say) -> Iterator[Line]:
    """Yield the lines of all ranks' files that are objects with the names `needs`.

    Others are counted in a line for each file: a kill tears at most the last one, and what it was for is done again.
    """
    for path in sorted(folder.glob(PATTERN)):
        bad = 0
        for line in _lines_of(path):
            if isinstance(line, dict) and all(name in line for name in needs):
                yield line
            else:
                bad += 1
        if bad:
            say(f"{path}: {bad} line(s) cannot be read; what they were for is done again")


def mend(folder: Path, *, say: Say) -> None:
    """Cut the torn last line off each file, where a kill left one, so that the next line begins a line of its own.

    Only one process may call it, while no other one writes. Raises ConfigError if a file cannot be written.
    """
    for path in sorted(folder.glob(PATTERN)):
        try:
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                with path.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)
                say(f"{path}: its last line is torn and left out; what it was for is done again")
        except OSError as error:
            raise ConfigError(f"{path} cannot be mended: {error.strerror}") from error


def _lines_of(path: Path) -> Iterator[Any]:
    try:
        with open_regular(path) as file:
            for line in file:
                try:
                    yield parse_json(line)
                except ValueError:
                    yield None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
