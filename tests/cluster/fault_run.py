"""A run folder from outside: which checkpoint must be gone on from, what its curve is, and how checkpoints are damaged.

Nothing of ds_dpo is used here: what the product decides is held against this.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What must be bit-equal in every line of metrics.jsonl, where there is such a value; the rest is times and memory.
CURVE = ("loss", "learning_rate", "pairs_seen", "gradient_norm", "implicit_margin", "implicit_accuracy", "beta")


def valid_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints of which every byte is there, newest first.

    One that was complete and killed before it had its name counts: every rank had agreed on it.
    """
    found = {step for folder in _folders(checkpoints) if (step := _step(folder)) is not None and is_valid(folder)}
    return sorted(found, reverse=True)


def newest_valid(checkpoints: Path) -> int | None:
    """Return the step that must be resumed from; None if there is none."""
    return next(iter(valid_steps(checkpoints)), None)


def _folders(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.iterdir() if path.is_dir()] if checkpoints.is_dir() else []


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"(?:partial_)?step_(\d+)", folder.name)
    return int(match[1]) if match else None


def is_valid(folder: Path) -> bool:
    """Compare each file with the manifest's size and SHA-256."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all(_is_intact((folder / name).read_bytes(), entry) for name, entry in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _is_intact(content: bytes, entry: dict[str, Any]) -> bool:
    return len(content) == entry["size"] and hashlib.sha256(content).hexdigest() == entry["sha256"]


def intact(checkpoints: Path) -> list[Path]:
    """Return the valid folders that have a checkpoint's name, newest first: an earlier damage may have left others."""
    found = [folder for folder in _folders(checkpoints) if folder.name.startswith("step_") and is_valid(folder)]
    return sorted(found, key=lambda folder: _step(folder) or 0, reverse=True)


def has_enough(checkpoints: Path, *, costs: int) -> bool:
    """Return whether a checkpoint is left to go on from once a damage has taken this many."""
    return len(intact(checkpoints)) > costs


def curve(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; a last one that was cut off is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def difference(lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str | None:
    """Return where a curve first leaves the reference, None while each of its steps is there once and is the same."""
    for number, (line, expected) in enumerate(zip(lines, reference, strict=False), start=1):
        if line["step"] != number:
            return f"line {number} of metrics.jsonl is step {line['step']}"
        for name in CURVE:
            if line.get(name) != expected.get(name):
                return f"step {number}: {name} is {line.get(name)!r}, uninterrupted {expected.get(name)!r}"
    return "it has more steps than the reference" if len(lines) > len(reference) else None


def losses(before: int | None, after: int | None, said: str) -> Iterator[str]:
    """Yield what of a run is lost: saved before a launch and not after it, or said by it to be saved.

    before, after: the newest valid steps. said: what a launch that ended well has printed.
    """
    if before is not None and (after is None or after < before):
        yield f"step {before} was saved before, and now the newest is {after}"
    stopped = re.search(r"stopped at step (\d+)", said)
    if stopped and int(stopped[1]) != after:
        yield f"it says that it stopped at step {stopped[1]}, and the newest checkpoint is {after}"


# ---- damage: what it is called in fault_cases.DAMAGES, and what does it ----


def _largest(folder: Path) -> Path:
    return max(folder.glob("*.pt"), key=lambda path: path.stat().st_size)


def _shard(folder: Path, rank: int) -> Path:
    (path,) = (path for path in folder.glob("*optim_states.pt") if re.search(rf"rank_{rank}_", path.name))
    return path


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _take_from_the_one_before(checkpoints: Path) -> None:
    newest, before = intact(checkpoints)[:2]
    shutil.copyfile(_shard(before, 1), _shard(newest, 1))


def _flip_bits(checkpoints: Path, newest: int | None) -> None:
    for folder in intact(checkpoints)[:newest]:
        _flip_a_bit(_largest(folder))


def _tear_a_later_one(checkpoints: Path) -> None:
    newest = intact(checkpoints)[0]
    later = newest.with_name(f"step_{(_step(newest) or 0) + 1:08d}")
    shutil.copytree(newest, later)
    (later / "manifest.json").unlink()
    _halve(_largest(later))
    (checkpoints / "latest").write_text(f"{later.name}\n")


def _remove_all(checkpoints: Path) -> None:
    for folder in _folders(checkpoints):
        shutil.rmtree(folder)


Damage = Callable[[Path], object]
DAMAGE: dict[str, Damage] = {
    "a shard of rank 1 is missing in the newest": lambda path: _shard(intact(path)[0], 1).unlink(),
    "the newest's largest file is cut in half": lambda path: _halve(_largest(intact(path)[0])),
    "a bit of the newest is another": lambda path: _flip_bits(path, 1),
    "the newest has no manifest": lambda path: (intact(path)[0] / "manifest.json").unlink(),
    "the newest's manifest is cut in half": lambda path: _halve(intact(path)[0] / "manifest.json"),
    "the newest's shards of ranks 0 and 1 are swapped": lambda path: _swap(
        _shard(intact(path)[0], 0), _shard(intact(path)[0], 1)
    ),
    "a shard of the newest is of the one before": _take_from_the_one_before,
    "the two newest are damaged": lambda path: _flip_bits(path, 2),
    "latest is missing": lambda path: (path / "latest").unlink(),
    "latest names nothing": lambda path: (path / "latest").write_text("step_99999999\n"),
    "a torn later one without a manifest": _tear_a_later_one,
    "all are damaged": lambda path: _flip_bits(path, None),
    "none is left, and latest is": _remove_all,
}
