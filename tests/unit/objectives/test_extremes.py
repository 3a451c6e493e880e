"""Objectives on errors that are very large, 0, or not finite."""

import math
from itertools import product
from math import exp, log
from typing import Any

import pytest
import torch
from closed_forms import CASES
from pairs_of_numbers import FIELDS, Pair, as_errors, gradients, losses, of_columns, some_pairs

from ds_dpo.objectives.losses import OBJECTIVES

EXTREMES = (-1e4, -1.0, 0.0, 1.0, 1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_extreme_inputs_give_finite_values_and_gradients(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    if "beta" in options:
        options = {**options, "beta": 1e5}
    pairs = [
        Pair(m_w, m_l, d_w, d_l, sign * math.sqrt(m_w * m_l), abs(d_w), abs(d_l))
        for d_w, d_l in product(EXTREMES, repeat=2)
        for m_w, m_l in product((0.0, 1e-30, 0.1, 1e4), repeat=2)
        for sign in (-1, 1)
    ]
    errors = as_errors(pairs, dtype=dtype)
    loss = OBJECTIVES[name].loss(errors, **options)
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    for field, gradient in gradients(loss, errors).items():
        assert gradient.isfinite().all(), field
    kind = OBJECTIVES[name].quantities
    if kind is not None:
        assert all(values.isfinite().all() for values in kind(errors, **options).values())


def test_extremes_have_their_limits() -> None:
    ahead, behind = Pair(0, 0, -1e4, 1e4, 0, 0, 0), Pair(0, 0, 1e4, -1e4, 0, 0, 0)
    # u is +-1e9
    assert losses("dpo", [ahead, behind], {"beta": 1e5}) == [0, 1e9]
    assert losses("hinge", [ahead, behind], {"beta": 1e5}) == [0, 1 + 1e9]
    assert losses("dmpo", [ahead, behind], {"beta": 1e5, "alpha": 0.01}) == pytest.approx([-log(0.99), -log(0.01)])
    assert losses("kto", [ahead, behind], {"beta": 1e5}) == [0, 1]
    assert losses("poly", [ahead, behind], {"beta": 1e5}) == [0, 1e9 + 1]
    # 1 / a of a pair that is surely on the wrong side, whatever u is; the limit a -> 0 has no such bound
    assert losses("alpha", [ahead, behind], {"beta": 1e5, "mean_probability": 0.5}) == pytest.approx([0, 2 / 0.9999])
    assert losses("alpha", [ahead, behind], {"beta": 1e5, "mean_probability": 0.9}) == pytest.approx([0, 1 / 0.89991])
    # an alpha that 1 - alpha loses in fp32
    behind_in_fp32 = as_errors([behind], dtype=torch.float32)
    assert OBJECTIVES["dmpo"].loss(behind_in_fp32, beta=1e5, alpha=1e-9).item() == pytest.approx(-log(1e-9), rel=1e-6)
    # beyond exponent 20 exp goes on as its tangent: here at 5e6
    tangent = exp(20) * (1 + 5e6 - 20)
    (found,) = losses("kto", [ahead], {"beta": 1e5, "utility": "risk_seeking_2", "undesirable_weight": 0.0})
    assert found == pytest.approx((2 - tangent) / 2, rel=1e-12)
    # one error far beyond the other: f is 0 of the one, 1 of the other
    assert losses("mapo", [Pair(0, 1e4, 0, 0, 0, 0, 0), Pair(1e4, 0, 0, 0, 0, 0, 0)], {}) == [0, 1e4 + 100]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_loss_that_is_not_finite_passes_a_gradient_of_nan_on(name: str, options: dict[str, Any]) -> None:
    """Engine.backward_and_step relies on it: it gives such a loss a gradient of NaN, for every rank to see."""
    usual = some_pairs(1)[0].fields()
    num_tried = 0
    for field, poison in product(FIELDS, (math.nan, math.inf, -math.inf)):
        columns = {key: torch.tensor([value]).requires_grad_() for key, value in (usual | {field: poison}).items()}
        errors = of_columns(columns)
        loss = OBJECTIVES[name].loss(errors, **options)
        if not torch.isfinite(loss).all():
            num_tried += 1
            found = gradients(loss.mean() * math.nan, errors)
            assert any(bool(gradient.isnan().any()) for gradient in found.values()), (field, poison)
    assert num_tried > 0
