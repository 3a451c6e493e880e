"""What DeepSpeed saved, stage by stage, brought into one form: placements, and tables of flat tensors.

A table is indexed [rank][group]. Source of the layouts: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py,
runtime/bf16_optimizer.py, runtime/fp16/unfused_optimizer.py (state_dict of each) and runtime/engine.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.files import TagFiles, check_number_of_ranks
from ds_dpo.zero_shards.layout import Placement, place_cut_group, place_split_parameter, place_split_parameters
from ds_dpo.zero_shards.unzeroed import match_masters

State = dict[str, Any]
Table = list[list[Tensor]]
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Shards:
    """Placements of all parameters, and the tables that they point into: fp32, the moments, frozen."""

    stage: int
    placements: dict[str, Placement]
    tables: dict[str, Table]


def open_stage(files: TagFiles, model: Sequence[State], optimizer: Sequence[State]) -> Shards:
    """Bring the loaded files of one checkpoint into one form.

    Raises CheckpointError where ranks are missing, disagree, or hold another number of elements than they should.
    """
    with _named(files.folder):
        inner = [state["optimizer_state_dict"] for state in optimizer]
        stages = {_stage(state) for state in inner}
        if len(stages) > 1:
            raise CheckpointError(f"{files.folder}: shards of ZeRO stages {sorted(stages)} mixed")
        stage = stages.pop() if stages else 0
        if stage == 0 and model[0]["param_shapes"] is not None:
            raise CheckpointError(f"{files.folder}: no *_optim_states.pt, which hold the weights of a ZeRO run")
        if stage not in OPENERS:
            raise CheckpointError(f"{files.folder}: ZeRO stage {stage}; known: {sorted(OPENERS)}")
        _check_ranks(files, inner, stage=stage)
        return OPENERS[stage](files.folder, model, inner)


def _stage(state: State) -> int:
    # DeepSpeed's BF16_Optimizer (ZeRO 1 with fp32 accumulation) saves no zero_stage
    return int(state["zero_stage"]) if "zero_stage" in state else 1


def _check_ranks(files: TagFiles, optimizer: Sequence[State], *, stage: int) -> None:
    if not optimizer:
        return
    counts = {max(count) if isinstance(count := state["partition_count"], list) else count for state in optimizer}
    if len(counts) > 1:
        raise CheckpointError(f"{files.folder}: shards of runs of {sorted(counts)} ranks mixed")
    expected = counts.pop()
    check_number_of_ranks(files.optimizer, expected=expected)
    check_number_of_ranks(files.model, expected=expected if stage == 3 else 1)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn a key or type that is not where DeepSpeed puts it into an error that names the checkpoint."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not laid out as DeepSpeed 0.19 does ({type(error).__name__}: {error})"
        ) from error


def _open_unpartitioned(folder: Path, model: Sequence[State], optimizer: Sequence[State]) -> Shards:
    """ZeRO 0: the module is the master in fp32; in 16 bit the master lies, without names, beside it."""
    weights, saved = _weights(model[0]), model[0]["optimizer"]
    if "fp32_groups_flat" in saved:
        raise CheckpointError(f"{folder}: ZeRO 0 with DeepSpeed's fused 16-bit optimizer is not supported; use ZeRO 1")
    groups = saved.get("fp32_groups")
    masters = dict(weights) if groups is None else match_masters(weights, groups, where=str(folder))
    frozen = {name: weight for name, weight in weights.items() if name not in masters}
    placements = {
        name: place_split_parameter(master.shape, group=group, offset=0, world_size=1)
        for group, (name, master) in enumerate(masters.items())
    }
    return Shards(
        stage=0,
        placements={**placements, **_place_whole(frozen)},
        tables={"fp32": [list(masters.values())], "frozen": [list(frozen.values())]},
    )


def _open_cut(folder: Path, model: Sequence[State], optimizer: Sequence[State]) -> Shards:
    """ZeRO 1 and 2: each group is one vector, cut into a part per rank; frozen weights are whole in the module."""
    group_shapes = model[0]["param_shapes"]
    parts = [state["single_partition_of_fp32_groups"] for state in optimizer]
    _check_groups(folder, parts, expected=len(group_shapes))
    paddings = optimizer[0].get("param_alignment_paddings") or [None] * len(group_shapes)
    placements: dict[str, Placement] = {}
    for group, shapes in enumerate(group_shapes):
        sizes = [part[group].numel() for part in parts]
        placements |= place_cut_group(shapes, group=group, part_sizes=sizes, paddings=paddings[group])
    if not _is_round_robin(model[0]["ds_config"]):
        for rank, state in enumerate(optimizer):
            _check_slices(folder, rank, state.get("param_slice_mappings"), placements)
    shared = model[0].get("shared_params") or {}
    frozen = {name: weight for name, weight in _weights(model[0]).items() if name not in {*placements, *shared}}
    states = [state["base_optimizer_state"] for state in optimizer]
    return Shards(
        stage=_stage(optimizer[0]),
        placements=_with_shared({**placements, **_place_whole(frozen)}, shared),
        tables={"fp32": parts, "frozen": [list(frozen.values())], **_moments(states, num_groups=len(group_shapes))},
    )


def _open_split(folder: Path, model: Sequence[State], optimizer: Sequence[State]) -> Shards:
    """ZeRO 3: each parameter is split over the ranks, trainable ones by sub-group, frozen ones as fragments."""
    group_shapes = model[0]["param_shapes"]
    parts = [state["fp32_flat_groups"] for state in optimizer]
    _check_groups(folder, parts, expected=len(group_shapes))
    placements: dict[str, Placement] = {}
    for group, shapes in enumerate(group_shapes):
        sizes = [part[group].numel() for part in parts]
        placements |= place_split_parameters(shapes, group=group, part_sizes=sizes)
    frozen_shapes = model[0].get("frozen_param_shapes") or {}
    for group, (name, shape) in enumerate(frozen_shapes.items()):
        placements[name] = place_split_parameter(shape, group=group, offset=0, world_size=len(model), is_frozen=True)
    fragments = [[state["frozen_param_fragments"][name] for name in frozen_shapes] for state in model]
    states = [state["optimizer_state_dict"] for state in optimizer]
    return Shards(
        stage=3,
        placements=_with_shared(placements, model[0].get("shared_params") or {}),
        tables={"fp32": parts, "frozen": fragments, **_moments(states, num_groups=len(group_shapes))},
    )


OPENERS: dict[int, Callable[[Path, Sequence[State], Sequence[State]], Shards]] = {
    0: _open_unpartitioned,
    1: _open_cut,
    2: _open_cut,
    3: _open_split,
}


def _weights(model: State) -> dict[str, Tensor]:
    buffers = set(model["buffer_names"])
    return {name: weight for name, weight in model["module"].items() if name not in buffers}


def _place_whole(frozen: Mapping[str, Tensor]) -> dict[str, Placement]:
    return {
        name: place_split_parameter(weight.shape, group=group, offset=0, world_size=1, is_frozen=True)
        for group, (name, weight) in enumerate(frozen.items())
    }


def _with_shared(placements: dict[str, Placement], shared: Mapping[str, str]) -> dict[str, Placement]:
    """Add the other names of shared parameters; shared: other name -> name under which it was saved."""
    return placements | {other: placements[name] for other, name in shared.items() if name in placements}


def _check_groups(folder: Path, parts: Sequence[Sequence[Tensor]], *, expected: int) -> None:
    for rank, part in enumerate(parts):
        if len(part) != expected or not all(isinstance(flat, Tensor) for flat in part):
            raise CheckpointError(
                f"{folder}: rank {rank} saved {len(part)} groups of weights where {expected} are named; "
                "weights offloaded to NVMe are not in the checkpoint"
            )


def _is_round_robin(settings: Any) -> bool:
    # DeepSpeed 0.19.8 shuffles the weights then, but saves (and itself uses) slices of the order before
    return isinstance(settings, dict) and bool(settings.get("zero_optimization", {}).get("round_robin_gradients"))


def _check_slices(folder: Path, rank: int, saved: Any, placements: Mapping[str, Placement]) -> None:
    """Compare where a rank says its slices start with where they should: the shards of two ranks may be swapped."""
    for group, slices in enumerate(saved or []):
        expected = {
            name: (span.start, span.stop - span.start)
            for name, placement in placements.items()
            for span in placement.spans
            if (span.rank, span.group) == (rank, group)
        }
        found = {name: (address.start, address.numel) for name, address in slices.items()}
        if found != expected:
            name = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
            raise CheckpointError(
                f"{folder}: the shard of rank {rank} holds (start, elements) {found.get(name)} of {name!r}, "
                f"not {expected.get(name)}; it belongs to another rank or run"
            )


def _moments(states: Sequence[Any], *, num_groups: int) -> dict[str, Table]:
    """Tables of the AdamW moments, those that every rank has for every group; none before the first update."""
    by_group = [state["state"] if isinstance(state, dict) else dict(enumerate(state)) for state in states]
    groups = range(num_groups)
    complete = [
        moment for moment in MOMENTS if all(moment in state.get(group, {}) for state in by_group for group in groups)
    ]
    return {moment: [[state[group][moment] for group in groups] for state in by_group] for moment in complete}
