"""Bring what DeepSpeed saved in each stage into one form: placements, and tables of flat tensors.

A table is indexed [rank], and then by group. Source of the layouts: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py,
stage3.py, runtime/bf16_optimizer.py, runtime/fp16/{fused,unfused}_optimizer.py (state_dict of each),
runtime/engine.py and checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.averages import open_averages
from ds_dpo.zero_shards.files import TagFiles, check_number_of_ranks
from ds_dpo.zero_shards.frozen import (
    fragment_table,
    module_weights,
    place_fragments,
    place_whole,
    whole_table,
    with_shared,
)
from ds_dpo.zero_shards.layout import Placement, place_cut_group, place_split_parameter, place_split_parameters
from ds_dpo.zero_shards.optimizer_states import open_optimizer_states
from ds_dpo.zero_shards.tables import ShardRow, Shards, shard_rows
from ds_dpo.zero_shards.universal import open_universal
from ds_dpo.zero_shards.unpickle import Shard
from ds_dpo.zero_shards.unzeroed import match_masters

State = dict[str, Any]


def open_stage(files: TagFiles, model: Sequence[Shard], optimizer: Sequence[Shard]) -> Shards:
    """Bring the loaded files of one checkpoint into one form.

    model: files of all ranks if they hold parts of frozen weights, else of the first.
    Raises CheckpointError if ranks are missing, disagree, or hold a wrong number of elements.
    """
    with _named(files.folder):
        if files.is_universal:
            return open_universal(files, model)
        stage = _common_stage(files, optimizer)
        if stage == 0 and model[0].content["param_shapes"] is not None:
            raise CheckpointError(f"{files.folder}: has no *_optim_states.pt, which hold the weights of a ZeRO run")
        if stage not in OPENERS:
            raise CheckpointError(f"{files.folder}: ZeRO stage {stage}; known: {sorted(OPENERS)}")
        _check_ranks(files, optimizer, stage=stage)
        shards = OPENERS[stage](files, model, optimizer)
        if not files.averages:
            return shards
        masters = [row.tensors for row in shards.tables["fp32"] if isinstance(row, ShardRow)]
        opened = {kind: open_averages(paths, masters) for kind, paths in files.averages.items()}
        return dataclasses.replace(
            shards,
            tables={**shards.tables, **{kind: rows for kind, (rows, _) in opened.items()}},
            average_updates={kind: updates for kind, (_, updates) in opened.items()},
        )


def _inner(shard: Shard) -> State:
    return shard.content["optimizer_state_dict"]


def _stage(shard: Shard) -> int:
    # DeepSpeed's BF16_Optimizer (ZeRO 1 with fp32 accumulation) saves no zero_stage
    state = _inner(shard)
    return int(state["zero_stage"]) if "zero_stage" in state else 1


def _common_stage(files: TagFiles, optimizer: Sequence[Shard]) -> int:
    stages = [_stage(shard) for shard in optimizer]
    for path, stage in zip(files.optimizer, stages, strict=True):
        if stage != stages[0]:
            raise CheckpointError(f"{path}: a shard of ZeRO stage {stage}, but the others are of stage {stages[0]}")
    return stages[0] if stages else 0


def _check_ranks(files: TagFiles, optimizer: Sequence[Shard], *, stage: int) -> None:
    if not optimizer:
        return
    counts = [_num_ranks(shard) for shard in optimizer]
    for path, count in zip(files.optimizer, counts, strict=True):
        if count != counts[0]:
            raise CheckpointError(f"{path}: a shard of a run of {count} ranks, but the others are of {counts[0]}")
    check_number_of_ranks(files.optimizer, expected=counts[0])
    check_number_of_ranks(files.model, expected=counts[0] if stage == 3 else 1)


def _num_ranks(shard: Shard) -> int:
    count = _inner(shard)["partition_count"]
    return max(count) if isinstance(count, list) else int(count)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn a missing key or a wrong type into an error that names the checkpoint."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not laid out as DeepSpeed 0.19 does ({type(error).__name__}: {error})"
        ) from error


def _open_unpartitioned(files: TagFiles, model: Sequence[Shard], optimizer: Sequence[Shard]) -> Shards:
    """Open ZeRO 0: in fp32 the module is the master; in 16 bit the masters are saved beside it without names."""
    if files.averages:
        raise CheckpointError(
            f"{next(iter(files.averages.values()))[0]}: moving averages do not belong to a run without ZeRO, which has "
            "no flat groups"
        )
    weights, saved = module_weights(model[0]), model[0].content["optimizer"] or {}
    groups = saved.get("fp32_groups_flat", saved.get("fp32_groups"))
    masters = dict(weights) if groups is None else match_masters(weights, groups, where=str(files.model[0]))
    frozen = {name: weight for name, weight in weights.items() if name not in masters}
    placements = {
        name: place_split_parameter(master.shape, group=group, offset=0, world_size=1)
        for group, (name, master) in enumerate(masters.items())
    }
    return Shards(
        stage=0,
        placements={**placements, **place_whole(frozen)},
        tables={"fp32": [ShardRow(model[0].archive, list(masters.values()))], "frozen": whole_table(model[0], frozen)},
    )


def _open_cut(files: TagFiles, model: Sequence[Shard], optimizer: Sequence[Shard]) -> Shards:
    """Open ZeRO 1 and 2: each group is one vector, cut into a part per rank; frozen weights are whole in the module."""
    group_shapes = model[0].content["param_shapes"]
    parts = [_inner(shard)["single_partition_of_fp32_groups"] for shard in optimizer]
    _check_groups(files, parts, expected=len(group_shapes))
    paddings = _inner(optimizer[0]).get("param_alignment_paddings") or [None] * len(group_shapes)
    placements: dict[str, Placement] = {}
    for group, shapes in enumerate(group_shapes):
        sizes = [part[group].numel() for part in parts]
        with _suspecting(files.optimizer, sizes):
            placements |= place_cut_group(shapes, group=group, part_sizes=sizes, paddings=paddings[group])
    if not _is_round_robin(model[0].content["ds_config"]):
        for rank, shard in enumerate(optimizer):
            _check_slices(files.optimizer[rank], rank, _inner(shard).get("param_slice_mappings"), placements)
    shared = model[0].content.get("shared_params") or {}
    frozen = {name: weight for name, weight in module_weights(model[0]).items() if name not in {*placements, *shared}}
    kept, optimizer_tables = open_optimizer_states(
        optimizer, [_inner(shard)["base_optimizer_state"] for shard in optimizer], parts
    )
    return Shards(
        stage=_stage(optimizer[0]),
        placements=with_shared({**placements, **place_whole(frozen)}, shared),
        tables={
            "fp32": shard_rows(optimizer, parts),
            "frozen": whole_table(model[0], frozen),
            **optimizer_tables,
        },
        optimizer=kept,
    )


def _open_split(files: TagFiles, model: Sequence[Shard], optimizer: Sequence[Shard]) -> Shards:
    """Open ZeRO 3: each parameter is split over the ranks, trained ones by sub-group, frozen ones as fragments."""
    group_shapes = model[0].content["param_shapes"]
    parts = [_inner(shard)["fp32_flat_groups"] for shard in optimizer]
    _check_groups(files, parts, expected=len(group_shapes))
    placements: dict[str, Placement] = {}
    for group, shapes in enumerate(group_shapes):
        sizes = [part[group].numel() for part in parts]
        with _suspecting(files.optimizer, sizes):
            placements |= place_split_parameters(shapes, group=group, part_sizes=sizes)
    kept, optimizer_tables = open_optimizer_states(
        optimizer, [_inner(shard)["optimizer_state_dict"] for shard in optimizer], parts
    )
    return Shards(
        stage=3,
        placements=with_shared(
            {**placements, **place_fragments(model[0], world_size=len(files.model))},
            model[0].content.get("shared_params") or {},
        ),
        tables={
            "fp32": shard_rows(optimizer, parts),
            "frozen": fragment_table(files, model),
            **optimizer_tables,
        },
        optimizer=kept,
    )


OPENERS: dict[int, Callable[[TagFiles, Sequence[Shard], Sequence[Shard]], Shards]] = {
    0: _open_unpartitioned,
    1: _open_cut,
    2: _open_cut,
    3: _open_split,
}


def _check_groups(files: TagFiles, parts: Sequence[Sequence[Tensor]], *, expected: int) -> None:
    for path, part in zip(files.optimizer, parts, strict=True):
        if len(part) != expected or not all(isinstance(flat, Tensor) for flat in part):
            raise CheckpointError(
                f"{path}: holds {len(part)} groups of weights, but {expected} are listed; "
                "weights offloaded to NVMe are not in the checkpoint"
            )


@contextlib.contextmanager
def _suspecting(paths: Sequence[Path], sizes: Sequence[int]) -> Iterator[None]:
    """Add to an error on sizes the file whose size differs from the others."""
    try:
        yield
    except CheckpointError as error:
        odd = [
            path for path, size in zip(paths, sizes, strict=True) if sizes.count(size) < max(map(sizes.count, sizes))
        ]
        raise CheckpointError(f"{(odd or [paths[0].parent])[0]}: {error}") from error


def _is_round_robin(settings: Any) -> bool:
    # DeepSpeed 0.19.8 then shuffles the weights, but saves (and itself uses) slices of the earlier order
    return isinstance(settings, dict) and bool(settings.get("zero_optimization", {}).get("round_robin_gradients"))


def _check_slices(path: Path, rank: int, saved: Any, placements: Mapping[str, Placement]) -> None:
    """Compare the slices that a rank lists with those that it should have: the shards of two ranks may be swapped."""
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
                f"{path}: holds (start, elements) {found.get(name)} of {name!r}, not {expected.get(name)} "
                f"as rank {rank} should; the file belongs to another rank or run"
            )
