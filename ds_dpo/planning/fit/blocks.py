"""Which blocks of a denoiser should compute their activations again, so that the passes stay within a limit.

One pass of the denoiser on the meta device, in which no block is checkpointed (`block_trace`), gives the bytes that
exist at each moment. What exists when some blocks are checkpointed follows from it by arithmetic: such a block does not
keep what only its backward pass needs, and keeps its inputs instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block that may be checkpointed.

    kept_bytes: what only its backward pass needs. flop: of computing that again, at the last of which torch stops.
    inputs: numbers of the tensors that it is called with.
    """

    name: str
    kept_bytes: int
    flop: int
    inputs: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A part of both passes without checkpoints.

    peak_bytes: most that existed. keeping: blocks, by number, that kept what their backward pass needs. turn: the block
    whose backward pass it was, None before the first. gone: inputs of blocks that existed no more. again: the moment is
    only there if the block `turn` computes again what it needs.
    """

    peak_bytes: int
    keeping: frozenset[int]
    turn: int | None
    gone: frozenset[int]
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The forward and backward passes: most bytes that exist at once, and FLOP with what is computed again."""

    peak_bytes: int
    flop: int


@dataclass(frozen=True, kw_only=True)
class BlockTable:
    """The blocks in forward order. input_bytes: by number of the input. flop: of both passes, without checkpoints."""

    blocks: Sequence[Block]
    moments: Sequence[Moment]
    input_bytes: Sequence[int]
    flop: int

    def peak_bytes(self, chosen: Collection[int]) -> int:
        """Return the most that exists at once if the chosen blocks, by number, compute their activations again."""
        return int(self._bytes(chosen).max())

    def passes(self, chosen: Collection[int]) -> Passes:
        """Return what both passes take if the chosen blocks, by number, compute their activations again."""
        flop = self.flop + sum(self.blocks[each].flop for each in chosen)
        return Passes(peak_bytes=self.peak_bytes(chosen), flop=flop)

    def names(self, chosen: Collection[int]) -> list[str]:
        """Return the names of blocks, in the order of the forward pass."""
        return [self.blocks[each].name for each in sorted(chosen)]

    def fewest(self, limit_bytes: float) -> list[int]:
        """Return blocks with which the passes stay within a limit; all that save anything if that is not possible.

        At the fullest moment, the block that saves most bytes for its FLOP is taken, until the limit is kept.
        """
        chosen: set[int] = set()
        while True:
            of_moments = self._bytes(chosen)
            fullest = int(of_moments.argmax())
            if of_moments[fullest] <= limit_bytes:
                break
            candidates = [each for each in self.moments[fullest].keeping - chosen if self.saved_bytes[each] > 0]
            if not candidates:
                return [number for number, saved in enumerate(self.saved_bytes) if saved > 0]
            chosen.add(min(candidates, key=self._price))
        for each in sorted(chosen, key=self._price, reverse=True):
            if self.peak_bytes(chosen - {each}) <= limit_bytes:  # a later choice made it needless
                chosen.remove(each)
        return sorted(chosen)

    @property
    def all(self) -> list[int]:
        """Return all blocks."""
        return list(range(len(self.blocks)))

    def best(self, count: int) -> list[int]:
        """Return the `count` blocks that save most bytes for their FLOP."""
        return sorted(sorted(self.all, key=self._price)[:count])

    @cached_property
    def saved_bytes(self) -> list[int]:
        """Return what each block saves: what it keeps, less the inputs that would not exist in its turn."""
        gone = {moment.turn: moment.gone for moment in self.moments if moment.again}
        return [
            block.kept_bytes - sum(self.input_bytes[each] for each in block.inputs & gone.get(number, frozenset()))
            for number, block in enumerate(self.blocks)
        ]

    def _price(self, number: int) -> tuple[float, int]:
        """Return the FLOP of a byte that a block saves; of equal blocks the first is taken."""
        saved = self.saved_bytes[number]
        return (self.blocks[number].flop / saved if saved > 0 else float("inf"), number)

    def _bytes(self, chosen: Collection[int]) -> Bytes:
        """Return the bytes at each moment."""
        peaks, keeping, holding, gone, again, kept, takes, sizes = self._arrays
        is_chosen = np.zeros(len(self.blocks), dtype=bool)
        is_chosen[list(chosen)] = True
        held = ((holding & is_chosen).astype(np.int64) @ takes > 0) & gone
        found = peaks - keeping @ (kept * is_chosen) + held @ sizes
        # a moment of computing again is only there for a chosen block
        there = np.array([number < 0 or is_chosen[number] for number in again])
        return np.where(there, found, 0)

    @cached_property
    def _arrays(self) -> tuple[Bytes, ...]:
        blocks, inputs = len(self.blocks), len(self.input_bytes)
        keeping = np.array([_mask(each.keeping, blocks) for each in self.moments])
        turns = [frozenset() if each.turn is None else frozenset((each.turn,)) for each in self.moments]
        return (
            np.array([each.peak_bytes for each in self.moments], dtype=np.int64),
            keeping.astype(np.int64),
            keeping | np.array([_mask(each, blocks) for each in turns]),
            np.array([_mask(each.gone, inputs) for each in self.moments]),
            np.array([each.turn if each.again and each.turn is not None else -1 for each in self.moments]),
            np.array([each.kept_bytes for each in self.blocks], dtype=np.int64),
            np.array([_mask(each.inputs, inputs) for each in self.blocks]).astype(np.int64),
            np.array(self.input_bytes, dtype=np.int64),
        )


def _mask(numbers: Collection[int], length: int) -> NDArray[np.bool_]:
    found = np.zeros(length, dtype=bool)
    found[list(numbers)] = True
    return found
