"""Read prompts and their seeds from the command line, a text file, or JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.outside import parse_json, read_regular

FIELDS = ("prompt", "seed")
MAX_BYTES = 64 * 2**20
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Drawing:
    """One image that each model is to draw."""

    prompt: str
    seed: int


def list_drawings(prompts: Sequence[str], file: Path | None, seeds: Sequence[int]) -> list[Drawing]:
    """Return each prompt with each seed, those of the file last. A prompt that states its seed gets only that.

    Raises ConfigError if there is nothing to draw, for an impossible seed, and as read_prompts does.
    """
    stated = [(prompt, None) for prompt in prompts] + ([] if file is None else read_prompts(file))
    if not stated:
        raise ConfigError("nothing to draw: give --prompt TEXT or --prompts FILE")
    drawings = [
        Drawing(prompt, chosen)
        for prompt, seed in stated
        for chosen in (dict.fromkeys(seeds) if seed is None else [seed])
    ]
    for drawing in drawings:
        if not 0 <= drawing.seed < 2**63:
            raise ConfigError(f"seed {drawing.seed}: must be 0 or more and less than 2**63")
    return list(dict.fromkeys(drawings))


def read_prompts(path: Path) -> list[tuple[str, int | None]]:
    """Return prompts and the seeds that they state: a prompt per line, or an object per line of a .jsonl file.

    Empty lines are ignored. Raises ConfigError that names file and line.
    """
    lines = full_lines(path)
    if path.suffix in JSON_LINES:
        return list(_from_json_lines(path, lines))
    return [(line, None) for _, line in lines]


def read_text(path: Path) -> str:
    """Return the text of a file of prompts. Raises ConfigError if it cannot be read as UTF-8."""
    try:
        return read_regular(path, max_bytes=MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({cut(str(error))}); give a UTF-8 text file") from error


def full_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not empty, each with its number from 1 on. Raises ConfigError if there is none."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), start=1)]
    full = [(number, line) for number, line in lines if line]
    if not full:
        raise ConfigError(f"--prompts {path}: has no prompt")
    return full


def json_objects(path: Path, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the object of each line, and before it where it is for messages.

    Raises ConfigError for a line that is not an object with a text named prompt.
    """
    for number, line in lines:
        where = f"--prompts {path}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError(
                f'{where}: {line[:80]}: must be an object such as {{"prompt": "a red circle", "seed": 7}}'
            )
        yield where, entry


def _from_json_lines(path: Path, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[str, int | None]]:
    for where, entry in json_objects(path, lines):
        unknown = sorted(entry.keys() - set(FIELDS))
        if unknown:
            raise ConfigError(f"{where}: {shown(unknown[0])} is not known; give only {' and '.join(FIELDS)}")
        seed = entry.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ConfigError(f"{where}: seed {shown(seed)} must be a whole number")
        yield entry["prompt"], seed
