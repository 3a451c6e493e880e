"""Pairs as plain numbers: what turns them into PairErrors, and an objective's losses and gradients on them."""

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.objectives.pair_errors import PairErrors, Quantity

FIELDS = ("policy_chosen_error", *get_args(Quantity))


@dataclass(frozen=True)
class Pair:
    """One pair's numbers: errors m, differences d, distances s of the chosen (w) and the rejected (l) image."""

    m_w: float
    m_l: float
    d_w: float
    d_l: float
    residual_product: float
    s_w: float
    s_l: float
    target: float = 1.0

    def fields(self) -> dict[str, float]:
        values = (self.m_w, self.m_l, self.d_w, self.d_l, self.residual_product, self.s_w, self.s_l)
        return dict(zip(FIELDS, values, strict=True))

    def swapped(self) -> "Pair":
        return Pair(self.m_l, self.m_w, self.d_l, self.d_w, self.residual_product, self.s_l, self.s_w, self.target)


def some_pairs(number: int = 30, *, target: float = 1.0) -> list[Pair]:
    """Errors of usual sizes, and one pair in five of large ones; residuals that agree, oppose, and differ in size."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(number):
        m_w, m_l, s_w, s_l = (
            torch.rand(4, generator=generator, dtype=torch.float64) * (0.2, 3.0)[index % 5 == 4]
        ).tolist()
        d_w, d_l = (torch.randn(2, generator=generator, dtype=torch.float64) * 0.01).tolist()
        cosine = torch.rand((), generator=generator, dtype=torch.float64).item() * 2 - 1
        pairs.append(Pair(m_w, m_l, d_w, d_l, cosine * math.sqrt(m_w * m_l), s_w, s_l, target))
    return pairs


def as_errors(pairs: list[Pair], *, dtype: torch.dtype = torch.float64, with_gradient: bool = True) -> PairErrors:
    columns = {
        name: torch.tensor([pair.fields()[name] for pair in pairs], dtype=dtype, requires_grad=with_gradient)
        for name in FIELDS
    }
    return of_columns(columns, target=torch.tensor([pair.target for pair in pairs], dtype=dtype))


def of_columns(columns: dict[str, Tensor], *, target: Tensor | None = None) -> PairErrors:
    chosen = columns["policy_chosen_error"]
    return PairErrors(
        policy_chosen_error=chosen,
        target_probability=torch.ones_like(chosen) if target is None else target,
        asked_for={name: value for name, value in columns.items() if name != "policy_chosen_error"},  # type: ignore[misc]
    )


def gradients(loss: Tensor, errors: PairErrors) -> dict[str, Tensor]:
    held = [getattr(errors, name) for name in FIELDS]
    found = torch.autograd.grad(loss.sum(), held, allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for name, value, gradient in zip(FIELDS, held, found, strict=True)
    }


def losses(name: str, pairs: list[Pair], options: dict[str, Any]) -> list[float]:
    return OBJECTIVES[name].loss(as_errors(pairs, with_gradient=False), **options).tolist()
