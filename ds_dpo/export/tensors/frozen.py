"""Frozen weights: a checkpoint holds them in the run's precision, the base with all their digits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_dpo.export.tensors.verification import is_rounding_of
from ds_dpo.export.tensors.weights import Derived, Weights


def restore_frozen(weights: Weights, base: Mapping[str, Tensor] | None) -> Weights:
    """Return the same weights, with the frozen ones as read_frozen returns them."""
    frozen = {name for name, placement in weights.parameters.items() if placement.is_frozen}
    if not frozen or base is None:
        return weights

    def read(name: str, dtype: torch.dtype) -> Tensor:
        if name in frozen:
            return read_frozen(weights, name, base, name).to(dtype)
        return weights.read(name, dtype=dtype)

    return Derived(weights.folder, weights.parameters, read)


def read_frozen(weights: Weights, saved: str, base: Mapping[str, Tensor] | None, name: str) -> Tensor:
    """Read a frozen weight in fp32: from the base if the checkpoint holds its rounding, else from the checkpoint.

    saved: its name in the checkpoint. name: its name in the base.
    """
    held = weights.read(saved)
    if base is not None and name in base and base[name].shape == held.shape and is_rounding_of(base[name], held):
        return base[name].to(torch.float32, copy=True)
    return held
