"""Find names for the master weights of a 16-bit run without ZeRO: DeepSpeed saves lists or flat vectors of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError

Fit = dict[str, Tensor]


def match_masters(weights: Mapping[str, Tensor], groups: Sequence[Sequence[Tensor] | Tensor], *, where: str) -> Fit:
    """Find the parameter of each master weight: it has the same shape and is its rounding, in the module's order.

    weights: 16-bit module weights by name, frozen ones included. groups: the fp32 masters of each group, as a list,
    or end to end in one vector. Returns name -> master.
    Raises CheckpointError unless there is exactly one such matching.
    """
    matched: Fit = {}
    for number, masters in enumerate(groups):
        free = [name for name in weights if name not in matched]
        first = _fit(free, weights, masters, backwards=False)
        # the same walk from the end gives the last fit; only when both agree is the matching the only one
        last = _fit(free, weights, masters, backwards=True)
        if first is None or last is None or first.keys() != last.keys():
            found = "no" if first is None else "more than one"
            raise CheckpointError(
                f"{where}: ZeRO 0 saves the master weights of 16-bit runs without names, and those of group {number} "
                f"match the module's weights in {found} way; save with ZeRO 1, 2 or 3"
            )
        matched |= first
    return {name: matched[name] for name in weights if name in matched}


def _fit(
    names: Sequence[str], weights: Mapping[str, Tensor], masters: Tensor | Sequence[Tensor], *, backwards: bool
) -> Fit | None:
    if isinstance(masters, Tensor):
        return _fit_vector(names, weights, masters, backwards=backwards)
    return _fit_list(names, weights, masters, backwards=backwards)


def _fit_list(
    names: Sequence[str], weights: Mapping[str, Tensor], masters: Sequence[Tensor], *, backwards: bool
) -> Fit | None:
    """Go through the names and match each whose weight is the rounding of the next master."""
    left = list(masters) if backwards else list(masters)[::-1]
    fit: Fit = {}
    for name in reversed(names) if backwards else names:
        if left and _rounds_to(left[-1], weights[name]):
            fit[name] = left.pop()
    return None if left else fit


def _fit_vector(names: Sequence[str], weights: Mapping[str, Tensor], vector: Tensor, *, backwards: bool) -> Fit | None:
    """Go through the names and match each whose weight is the rounding of the next elements of the vector."""
    taken = 0
    fit: Fit = {}
    for name in reversed(names) if backwards else names:
        numel = weights[name].numel()
        start = vector.numel() - taken - numel if backwards else taken
        if 0 < numel <= vector.numel() - taken:
            master = vector[start : start + numel].view(weights[name].shape)
            if _rounds_to(master, weights[name]):
                fit[name] = master
                taken += numel
    return fit if taken == vector.numel() else None


def _rounds_to(master: Tensor, weight: Tensor) -> bool:
    return master.shape == weight.shape and torch.equal(master.to(weight.dtype), weight)
