"""The states that the optimizers of all ranks keep for each group of weights, under any names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_dpo.zero_shards.tables import OptimizerStates, Table, shard_rows
from ds_dpo.zero_shards.unpickle import Shard

Values = list[list[Any]]  # [rank][group]


def open_optimizer_states(
    shards: Sequence[Shard], states: Sequence[Any], masters: Sequence[Sequence[Tensor]]
) -> tuple[OptimizerStates, dict[str, Table]]:
    """Sort by kind what the optimizers saved; before the first update they have saved nothing.

    states: [rank], each torch's state_dict of the optimizer, or a list by group. masters: [rank][group].
    Returns what the optimizers keep, and tables of the states that have a value per element.
    """
    by_group = [state["state"] if isinstance(state, dict) else dict(enumerate(state)) for state in states]
    names = dict.fromkeys(name for rank in by_group for group in rank.values() for name in group)
    tables: dict[str, Table] = {}
    scalars: dict[str, Any] = {}
    others: dict[str, str] = {}
    for name in names:
        values = [
            [state.get(group, {}).get(name) for group in range(len(own))]
            for state, own in zip(by_group, masters, strict=True)
        ]
        if _are_elementwise(values, masters):
            tables[name] = shard_rows(shards, values)
        elif _are_one_number(values):
            scalars[name] = values[0][0]
        else:
            others[name] = _describe(values)
    return OptimizerStates(elementwise=tuple(tables), scalars=scalars, others=others), tables


def _are_elementwise(values: Values, masters: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether each value is a vector as long as its master; ZeRO 1 and 2 keep padding at the end of states."""
    return all(
        isinstance(value, Tensor)
        and value.dim() == 1
        and value.dtype == torch.float32
        and value.numel() >= master.numel()
        for own, groups in zip(values, masters, strict=True)
        for value, master in zip(own, groups, strict=True)
    )


def _are_one_number(values: Values) -> bool:
    flat = [value for own in values for value in own]
    if not all(isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0) for value in flat):
        return False
    return len({float(value) for value in flat}) == 1


def _describe(values: Values) -> str:
    value = next((value for own in values for value in own if value is not None), None)
    if any(value is None for own in values for value in own):
        return "in some groups of weights only"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)} in the first group"
    return "not the same in all groups" if isinstance(value, int | float) else f"of type {type(value).__name__}"
