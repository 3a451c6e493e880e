"""How a whole checkpoint in one file keeps parameters: one by one, joined, or with their halves exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InFile:
    """A tensor of a file: parameters that are joined along their rows, in order, by name.

    halves_swapped: the second half of the rows comes first.
    """

    parts: tuple[str, ...]
    halves_swapped: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return its shape. shapes: of the parameters."""
        _, *others = shapes[self.parts[0]]
        return (sum(shapes[part][0] for part in self.parts), *others)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return it. tensors: its parts, in order."""
        joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        return torch.cat(joined.chunk(2)[::-1]) if self.halves_swapped else joined
