"""Give a live DeepSpeed engine other weights, of any ZeRO stage: each rank writes its own part of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.engine.elastic import follow_masters
from ds_dpo.engine.layout import engine_layout


def set_weights(raw: Any, weights: Mapping[str, Tensor]) -> None:
    """Set the masters of a deepspeed.DeepSpeedEngine, its working weights, and the frozen weights that are named.

    Every rank must call this. weights: at least the trained ones, of the engine's shapes, on the host; one is whole at
    a time, so that a mapping that reads lazily from files needs no memory.
    """
    prepare = getattr(raw.optimizer, "checkpoint_event_prologue", None)
    if prepare is not None:
        prepare()  # ZeRO 3: afterwards no weight is whole
    with raised_everywhere():
        _set_own_parts(raw, weights)
    follow_masters(raw)


@torch.no_grad()
def _set_own_parts(raw: Any, weights: Mapping[str, Tensor]) -> None:
    layout = engine_layout(raw)
    for part in layout.parts:
        part.of(layout.masters).copy_(weights[part.name].flatten()[part.start : part.start + part.numel])
    for name, parameter in raw.module.named_parameters():
        if not parameter.requires_grad and name in weights:
            _set_frozen(parameter, weights[name], rank=raw.global_rank)


def _set_frozen(parameter: nn.Parameter, whole: Tensor, *, rank: int) -> None:
    partitioned: Any = getattr(parameter, "ds_tensor", None)
    if partitioned is None:
        parameter.copy_(whole)
        return
    own = partitioned.data.view(-1)
    start = rank * own.numel()
    mine = whole.flatten()[start : start + own.numel()]  # the last rank's part is padded
    own[: mine.numel()].copy_(mine)
