"""Resume from a checkpoint of another number of ranks or ZeRO stage: each rank reads its own part of each tensor.

This sets what DeepSpeed's own load would set: master weights, the optimizer's states, moving averages, frozen weights,
learning rate and schedule, loss scale, counters. The working weights follow from the masters as after an update. Only
frozen weights are ever whole on a rank, and no code of the checkpoint runs.
Source: load_checkpoint of deepspeed 0.19.8, runtime/engine.py, and load_state_dict of runtime/zero/stage_1_and_2.py,
runtime/zero/stage3.py and runtime/bf16_optimizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.engine.layout import EngineLayout, engine_layout
from ds_dpo.engine.moving_average import FIELDS, MovingAverage
from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.reader import ZeroCheckpoint, open_checkpoint
from ds_dpo.zero_shards.training_state import TrainingState

# the parts of a dynamic loss scale that change during a run; the rest are settings
SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_into(
    raw: Any, folder: Path, *, averages: Sequence[MovingAverage], has_frozen_weights: bool
) -> Mapping[str, Any]:
    """Set a deepspeed.DeepSpeedEngine, new or in use, to a checkpoint of any layout; every rank must call this.

    The files' checksums must already be verified. averages: the moving averages that the run keeps.
    has_frozen_weights: whether the checkpoint must also hold the weights that are not trained.
    Returns what the caller of save_checkpoint gave. Raises CheckpointError on all ranks, before anything is changed, if
    the checkpoint does not fit; after a file that fails later, the engine must not be used.
    """
    with raised_everywhere():
        checkpoint, training, layout = _open(raw, folder, averages=averages, has_frozen_weights=has_frozen_weights)
    prepare = getattr(raw.optimizer, "checkpoint_event_prologue", None)
    if prepare is not None:
        prepare()  # ZeRO 3: afterwards no weight is whole
    with raised_everywhere():
        _read(raw, checkpoint, training, layout, averages=averages, with_frozen=has_frozen_weights)
    follow_masters(raw)
    return training.client_state


def _open(
    raw: Any, folder: Path, *, averages: Sequence[MovingAverage], has_frozen_weights: bool
) -> tuple[ZeroCheckpoint, TrainingState, EngineLayout]:
    checkpoint, layout = open_checkpoint(folder, verify=False), engine_layout(raw)
    training = checkpoint.training()
    _require_same_weights(checkpoint, layout, raw.module, has_frozen_weights=has_frozen_weights)
    others = checkpoint.optimizer.others
    if others:
        listed = ", ".join(f"{name} ({what})" for name, what in others.items())
        raise CheckpointError(
            f"{folder}: its optimizer keeps {listed}, which is not a value per weight, so that it only fits the ranks, "
            f"ZeRO stage and DeepSpeed settings that saved it; resume with {checkpoint.world_size} ranks at stage "
            f"{checkpoint.stage}"
        )
    for average in averages:
        if not checkpoint.has_average(average.kind):
            raise CheckpointError(f"{folder} has no moving average of the weights, which {FIELDS[average.kind]} needs")
    return checkpoint, training, layout


def _require_same_weights(
    checkpoint: ZeroCheckpoint, layout: EngineLayout, module: nn.Module, *, has_frozen_weights: bool
) -> None:
    saved = checkpoint.parameters
    for name, placement in layout.placements.items():
        found = saved.get(name)
        if found is None or found.is_frozen or found.shape != placement.shape:
            what = "missing" if found is None else "frozen" if found.is_frozen else f"of shape {found.shape}"
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {what} there, but this run trains it with shape {placement.shape}"
            )
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        if name in saved and not saved[name].is_frozen:
            raise CheckpointError(f"{checkpoint.folder}: {name} was trained there, but this run freezes it")
        if has_frozen_weights and name not in saved:
            raise CheckpointError(f"{checkpoint.folder}: the frozen weight {name} is missing")


@torch.no_grad()
def _read(
    raw: Any,
    checkpoint: ZeroCheckpoint,
    training: TrainingState,
    layout: EngineLayout,
    *,
    averages: Sequence[MovingAverage],
    with_frozen: bool,
) -> None:
    for part in layout.parts:
        checkpoint.read_part(part.name, "fp32", start=part.start, out=part.of(layout.masters))
    _read_optimizer(raw, checkpoint, training, layout)
    for average in averages:
        for part in layout.parts:
            checkpoint.read_part(part.name, average.kind, start=part.start, out=part.of(average.groups))
        average.continue_after(checkpoint.average_updates(average.kind))
    if with_frozen:
        _read_frozen(raw, checkpoint)
    raw.lr_scheduler.load_state_dict(training.schedule)
    raw.global_steps, raw.skipped_steps = training.global_steps, training.skipped_steps
    raw.global_samples = training.global_samples
    if raw.fp16_enabled() and raw.optimizer.loss_scaler.dynamic and training.loss_scaler.get("dynamic"):
        for name in SCALE_STATE:
            setattr(raw.optimizer.loss_scaler, name, training.loss_scaler[name])


def _read_optimizer(raw: Any, checkpoint: ZeroCheckpoint, training: TrainingState, layout: EngineLayout) -> None:
    """Give the optimizer the saved states of this rank's parts; the padding between them is 0."""
    kept, inner = checkpoint.optimizer, raw.optimizer.optimizer
    # first release a live engine's states and DeepSpeed's views of them: the new ones need the memory
    inner.state.clear()
    raw.optimizer._link_all_hp_params()
    raw.optimizer._hp_optimizer_states_linked = False
    states: dict[int, dict[str, Any]] = {}
    if kept.elementwise:
        for index, master in enumerate(layout.masters):
            states[index] = {**_copied(kept.scalars), **{name: torch.zeros_like(master) for name in kept.elementwise}}
    for name in kept.elementwise:
        groups = [states[index][name] for index in range(len(layout.masters))]
        for part in layout.parts:
            checkpoint.read_part(part.name, name, start=part.start, out=part.of(groups))
    if hasattr(raw.optimizer, "_set_fp32_optimizer_param_groups"):
        raw.optimizer._set_fp32_optimizer_param_groups()  # ZeRO 3 gives the optimizer its groups only during an update
    settings = inner.state_dict()["param_groups"]
    for group, rates in zip(settings, training.rates, strict=True):
        group.update(rates)
    inner.load_state_dict({"state": states, "param_groups": settings})
    if hasattr(raw.optimizer, "_clear_fp32_optimizer_param_groups"):
        raw.optimizer._clear_fp32_optimizer_param_groups()


def _copied(scalars: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in scalars.items()}


def _read_frozen(raw: Any, checkpoint: ZeroCheckpoint) -> None:
    for name, parameter in raw.module.named_parameters():
        if parameter.requires_grad:
            continue
        if not hasattr(parameter, "ds_tensor"):
            checkpoint.read(name, out=parameter.data)
            continue
        own = parameter.ds_tensor.data.view(-1)
        start = raw.global_rank * own.numel()
        own = own[: max(0, parameter.ds_numel - start)]
        if own.numel():
            checkpoint.read_part(name, start=start, out=own)


def follow_masters(raw: Any) -> None:
    """Set the working weights of all ranks to the rounded masters, as DeepSpeed's update does."""
    optimizer = raw.optimizer
    if raw.zero_optimization_partition_weights():
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # afterwards small weights are whole again on each rank
    else:
        optimizer.update_lp_params()
