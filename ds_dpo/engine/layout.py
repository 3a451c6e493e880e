"""The places of weights in a live DeepSpeed engine: its flat master groups, and this rank's part of each.

The arithmetic is that of zero_shards.layout, which reads the same groups from a checkpoint. DeepSpeed's own accessors
(utils/tensor_fragment.py of 0.19.8) are not used: with round_robin_gradients they return other elements than the groups
hold, and under ZeRO 3 they need whole tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_dpo.zero_shards.layout import Placement, place_cut_group, place_split_parameters


@dataclasses.dataclass(frozen=True)
class Part:
    """This rank's elements [start, start + numel) of a weight, which begin at offset in a flat group."""

    name: str
    start: int
    numel: int
    group: int
    offset: int

    def of(self, groups: Sequence[Tensor]) -> Tensor:
        """Return the elements as a view into a rank's flat groups."""
        return groups[self.group][self.offset : self.offset + self.numel]


@dataclasses.dataclass(frozen=True)
class EngineLayout:
    """How an engine holds its trained weights.

    masters: this rank's fp32 master weights, 1-D, one per group, padding included. placements: those of all weights on
    all ranks. parts: this rank's parts, at most one per weight.
    """

    masters: list[Tensor]
    placements: dict[str, Placement]
    parts: list[Part]


def engine_layout(raw: Any) -> EngineLayout:
    """Return the layout of a deepspeed.DeepSpeedEngine of ZeRO 1, 2 or 3 with an optimizer."""
    masters, shapes = master_groups(raw.optimizer), _group_shapes(raw)
    placements: dict[str, Placement] = {}
    for group, (own, master, gaps) in enumerate(zip(shapes, masters, _paddings(raw), strict=True)):
        sizes = [master.numel()] * raw.dp_world_size
        placements |= (
            place_split_parameters(own, group=group, part_sizes=sizes)
            if raw.zero_optimization_partition_weights()
            else place_cut_group(own, group=group, part_sizes=sizes, paddings=gaps)
        )
    return EngineLayout(masters=masters, placements=placements, parts=_parts_of(placements, raw.global_rank))


def layout_digest(raw: Any) -> str:
    """Return hex digits that are the same for engines that can load each other's checkpoints file by file."""
    shapes = [[(name, list(shape)) for name, shape in group.items()] for group in _group_shapes(raw)]
    sizes = [master.numel() for master in master_groups(raw.optimizer)]
    described = [type(raw.optimizer).__name__, raw.zero_optimization_stage(), raw.dp_world_size]
    content = json.dumps([*described, shapes, sizes, _paddings(raw)])
    return hashlib.sha256(content.encode()).hexdigest()


def _group_shapes(raw: Any) -> list[Mapping[str, Sequence[int]]]:
    """Return names and shapes of each group's weights, in the group's order."""
    return list(raw._get_zero_param_shapes())


def _paddings(raw: Any) -> list[list[int] | None]:
    """Return the number of padding elements after each weight of each group, None if there is no padding."""
    found = getattr(raw.optimizer, "round_robin_bit16_padding", None)
    return [None] * len(master_groups(raw.optimizer)) if found is None else [list(group) for group in found]


def master_groups(optimizer: Any) -> list[Tensor]:
    """Return this rank's fp32 master weights as the optimizer updates them: 1-D, padded, one per group."""
    # ZeRO 3; ZeRO 1 with bf16 and fp32 accumulation; ZeRO 1 and 2
    names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    return list(next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)))


def _parts_of(placements: Mapping[str, Placement], rank: int) -> list[Part]:
    parts = []
    for name, placement in placements.items():
        start = 0
        for span in placement.spans:
            numel = span.stop - span.start
            if span.rank == rank:
                parts.append(Part(name=name, start=start, numel=numel, group=span.group, offset=span.start))
            start += numel
    return parts
