"""The place of each parameter in the flat tensors that the ranks saved: arithmetic on shapes, without files.

Sizes and positions count elements. ZeRO 1 and 2 lay the parameters of a group end to end and cut that vector into
one part per rank; ZeRO 3 cuts every parameter into equal parts and lays those end to end on each rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ds_dpo.errors import CheckpointError

Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Span:
    """Elements [start, stop) of the flat tensor of one group on one rank."""

    rank: int
    group: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """A parameter's shape and, in order, the spans that its elements fill."""

    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    is_frozen: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def place_cut_group(
    shapes: Shapes, *, group: int, part_sizes: Sequence[int], paddings: Sequence[int] | None
) -> dict[str, Placement]:
    """Place one group of ZeRO 1 or 2: one vector, cut into parts of part_sizes[rank] elements.

    paddings: number of empty elements after each parameter, None if there are none.
    Raises CheckpointError when the parts hold too few elements, or more than DeepSpeed's padding explains.
    """
    gaps = [0] * len(shapes) if paddings is None else list(paddings)
    if len(gaps) != len(shapes):
        raise CheckpointError(f"group {group}: {len(gaps)} paddings for {len(shapes)} parameters")
    placements, offset = {}, 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        numel = math.prod(shape)
        placements[name] = Placement(tuple(shape), tuple(_cut(offset, offset + numel, group, part_sizes)))
        offset += numel + gap
    alignment = 2 * len(part_sizes)  # DeepSpeed fills the vector up to a multiple of this
    _check_count(group, needed=offset, found=sum(part_sizes), at_most=math.ceil(offset / alignment) * alignment)
    return placements


def _cut(start: int, stop: int, group: int, part_sizes: Sequence[int]) -> list[Span]:
    spans, part_start = [], 0
    for rank, size in enumerate(part_sizes):
        left, right = max(start, part_start), min(stop, part_start + size)
        if left < right:
            spans.append(Span(rank, group, left - part_start, right - part_start))
        part_start += size
    return spans


def place_split_parameters(shapes: Shapes, *, group: int, part_sizes: Sequence[int]) -> dict[str, Placement]:
    """Place one sub-group of ZeRO 3: each parameter split into equal parts, the last ones padded.

    part_sizes: number of the sub-group's elements that each rank saved.
    Raises CheckpointError when a rank saved another number of elements than the shapes call for.
    """
    world_size = len(part_sizes)
    placements, offset = {}, 0
    for name, shape in shapes.items():
        placements[name] = place_split_parameter(shape, group=group, offset=offset, world_size=world_size)
        offset += math.ceil(math.prod(shape) / world_size)
    for size in part_sizes:
        _check_count(group, needed=offset, found=size, at_most=offset)
    return placements


def place_split_parameter(
    shape: Sequence[int], *, group: int, offset: int, world_size: int, is_frozen: bool = False
) -> Placement:
    """Place one parameter whose equal parts start at the same offset on every rank."""
    numel = math.prod(shape)
    part = math.ceil(numel / world_size)
    own = [max(0, min(part, numel - rank * part)) for rank in range(world_size)]
    spans = [Span(rank, group, offset, offset + size) for rank, size in enumerate(own) if size]
    return Placement(tuple(shape), tuple(spans), is_frozen)


def spans_within(placement: Placement, start: int, stop: int) -> list[Span]:
    """Return the spans that hold elements [start, stop) of a parameter, in order."""
    found, begin = [], 0
    for span in placement.spans:
        left, right = max(start, begin), min(stop, begin + span.stop - span.start)
        if left < right:
            found.append(dataclasses.replace(span, start=span.start + left - begin, stop=span.start + right - begin))
        begin += span.stop - span.start
    return found


def _check_count(group: int, *, needed: int, found: int, at_most: int) -> None:
    if not needed <= found <= at_most:
        raise CheckpointError(
            f"group {group}: the shards hold {found} elements, but the parameters need {needed}; "
            "files of different checkpoints may have been mixed"
        )
