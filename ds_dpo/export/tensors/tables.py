"""Tables that a denoiser's file has beside its parameters, such as positions: no checkpoint of training holds them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ds_dpo.export.tensors.weights import Derived, Weights
from ds_dpo.models.families.table import kind_of
from ds_dpo.models.weights.parts import skeleton
from ds_dpo.zero_shards.layout import Placement


def with_tables(weights: Weights, config: Mapping[str, Any], base: Mapping[str, Tensor] | None) -> Weights:
    """Return the same weights and the tables of their denoiser: the base's own, else as diffusers computes them.

    config: the denoiser's diffusers configuration. base: the base's own weights, if available.
    """
    kind = kind_of(config)
    missing = {name: shape for name, shape in kind.tables(config).items() if name not in weights.parameters}
    if not missing:
        return weights

    @cache
    def computed() -> Mapping[str, Tensor]:
        return skeleton(kind.model_class(), config).state_dict()

    def read(name: str, dtype: torch.dtype) -> Tensor:
        if name not in missing:
            return weights.read(name, dtype=dtype)
        own = base[name] if base is not None and name in base and tuple(base[name].shape) == missing[name] else None
        return (computed()[name] if own is None else own).to(dtype, copy=True)

    places = {name: Placement(shape, (), is_frozen=True) for name, shape in missing.items()}
    return Derived(weights.folder, {**weights.parameters, **places}, read)
