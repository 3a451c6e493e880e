"""The tensors that checkpoints hold, to compare two of them by content."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's .pt files, by file and place in it; the files are the tests' own."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.pt"))
        for name, tensor in _tensors(torch.load(path, weights_only=False), path.name).items()
    }


def differing_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Return the names of those that are not equal to the bit, or that only one of the two has."""
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if not _is_same(found.get(name), expected.get(name))]


def _is_same(found: Tensor | None, expected: Tensor | None) -> bool:
    return found is not None and expected is not None and found.dtype == expected.dtype and torch.equal(found, expected)


def _tensors(value: object, place: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {place: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, part in parts for name, tensor in _tensors(part, f"{place}/{key}").items()}
