"""Names for the master weights of a 16-bit run without ZeRO, which DeepSpeed saves as bare lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError


def match_masters(
    weights: Mapping[str, Tensor], groups: Sequence[Sequence[Tensor]], *, where: str
) -> dict[str, Tensor]:
    """Find the parameter of each master weight: the one of its shape that is its rounding, in the module's order.

    weights: 16-bit module weights by name, frozen ones included. groups: fp32 masters, a list for each group.
    Returns name -> master. Raises CheckpointError unless there is exactly one such matching.
    """
    matched: dict[str, Tensor] = {}
    for number, masters in enumerate(groups):
        free = [name for name in weights if name not in matched]
        first = _first_fit(free, weights, masters)
        # the same walk from the end gives the last fit; only when both agree is the matching the only one
        last = _first_fit(free[::-1], weights, masters[::-1])
        if first is None or last is None or first != last[::-1]:
            found = "no" if first is None else "more than one"
            raise CheckpointError(
                f"{where}: ZeRO 0 saves 16-bit runs' master weights without names, and for group {number} {found} "
                "matching with the module's weights is possible; save with ZeRO 1, 2 or 3"
            )
        matched |= dict(zip(first, masters, strict=True))
    return {name: matched[name] for name in weights if name in matched}


def _first_fit(names: Sequence[str], weights: Mapping[str, Tensor], masters: Sequence[Tensor]) -> list[str] | None:
    fit: list[str] = []
    for name in names:
        if len(fit) < len(masters) and _rounds_to(masters[len(fit)], weights[name]):
            fit.append(name)
    return fit if len(fit) == len(masters) else None


def _rounds_to(master: Tensor, weight: Tensor) -> bool:
    return master.shape == weight.shape and torch.equal(master.to(weight.dtype), weight)
