"""Objectives against their closed forms, and their gradients against derivatives taken by hand."""

from math import log
from typing import Any

import pytest
import torch
from closed_forms import CASES, CLOSED_FORMS, CLOSED_UTILITIES, HOLDING_BACK_GRADIENTS, TAKING_SOFT_TARGETS, sigma
from pairs_of_numbers import FIELDS, Pair, as_errors, gradients, losses, of_columns, some_pairs
from torch import Tensor

from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.objectives.kto_utilities import UTILITIES
from ds_dpo.objectives.losses import OBJECTIVES, orpo, sft
from ds_dpo.objectives.pair_errors import PairErrors


def test_every_objective_has_a_closed_form() -> None:
    assert CLOSED_FORMS.keys() == OBJECTIVES.keys()
    assert CLOSED_UTILITIES.keys() == UTILITIES.keys()
    assert UTILITIES.keys() == set(
        OBJECTIVE_SECTIONS["kto"].model_fields["utility"].annotation.__args__  # type: ignore[union-attr]
    )


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        (name, options, target)
        for name, options in CASES
        for target in ((1.0, 0.5, 0.8) if name in TAKING_SOFT_TARGETS else (1.0,))
    ],
)
def test_values_and_gradients_are_those_of_the_closed_form(name: str, options: dict[str, Any], target: float) -> None:
    pairs = some_pairs(target=target)
    errors = as_errors(pairs)
    loss = OBJECTIVES[name].loss(errors, **options)
    assert loss.shape == (len(pairs),)
    found = gradients(loss, errors)
    for index, pair in enumerate(pairs):
        value, slopes = CLOSED_FORMS[name][0](pair, **options)
        assert loss[index].item() == pytest.approx(value, rel=1e-10, abs=1e-10)
        for field in FIELDS:
            assert found[field][index].item() == pytest.approx(slopes.get(field, 0.0), rel=1e-10, abs=1e-10), field


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in HOLDING_BACK_GRADIENTS])
def test_gradients_are_those_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    columns = [getattr(as_errors(some_pairs(8)), field) for field in FIELDS]

    def loss(*values: Tensor) -> Tensor:
        return OBJECTIVES[name].loss(of_columns(dict(zip(FIELDS, values, strict=True))), **options)

    assert torch.autograd.gradcheck(loss, columns, eps=1e-7, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_each_pair_has_its_own_loss(name: str, options: dict[str, Any]) -> None:
    """The mean stands outside of all else: peers have had -logsigmoid(mean(...)), and one lambda for a batch."""
    first, second = some_pairs(2)
    pairs = as_errors([first, second])
    together = OBJECTIVES[name].loss(pairs, **options)
    apart = [as_errors([pair]) for pair in (first, second)]
    alone = [OBJECTIVES[name].loss(errors, **options) for errors in apart]
    assert together.tolist() == [loss.item() for loss in alone]
    assert together.mean().item() == pytest.approx(sum(loss.item() for loss in alone) / 2, rel=1e-14)
    found = gradients(together, pairs)
    own = [gradients(loss, errors) for loss, errors in zip(alone, apart, strict=True)]
    for field in FIELDS:
        assert found[field].tolist() == [gradient[field].item() for gradient in own]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_descent_lowers_the_chosen_error_and_raises_the_rejected(name: str, options: dict[str, Any]) -> None:
    # a little ahead on the chosen image, since dspo looks at the rejected one through the gap alone
    pair = Pair(m_w=0.12, m_l=0.10, d_w=-0.001, d_l=0.0, residual_product=-0.01, s_w=1e-5, s_l=1e-5)
    errors = as_errors([pair])
    found = gradients(OBJECTIVES[name].loss(errors, **options), errors)
    # a policy's error moves its difference by as much
    assert (found["policy_chosen_error"] + found["chosen_difference"]).item() > 0
    rejected = (found["policy_rejected_error"] + found["rejected_difference"]).item()
    assert rejected == 0 if name == "sft" else rejected < 0


# ---- single values ----


def test_the_first_losses_of_an_untrained_policy() -> None:
    start = Pair(0.12, 0.10, 0.0, 0.0, 0.05, 0.0, 0.0)
    values = {name: losses(name, [start], cases[0])[0] for name, (_, cases) in CLOSED_FORMS.items()}
    assert values["dpo"] == values["sdpo"] == pytest.approx(log(2), abs=1e-15)
    assert values["ipo"] == 0.25
    assert values["hinge"] == 1
    assert values["sft"] == values["dspo"] == 0.12
    assert values["dmpo"] == pytest.approx(0.5 * log(0.5 / 0.99) + 0.5 * log(0.5 / 0.01))
    assert values["poly"] == pytest.approx(log(2) + 0.5)
    # a is almost 1/2: (sqrt(1/2) - 3/4) / (-1/4)
    assert values["alpha"] == pytest.approx(3 - 2 * 2**0.5, abs=1e-4)
    assert values["linear"] == pytest.approx(0.5 * 0.02)
    (kto,) = losses("kto", [start], {"beta": 5000.0})
    assert kto == 0.5


def test_poly_without_its_term_is_dpo_to_the_bit() -> None:
    for target in (1.0, 0.5, 0.8):
        pairs, options = some_pairs(target=target), {"beta": 5000.0}
        assert losses("poly", pairs, {**options, "poly_weight": 0.0}) == losses("dpo", pairs, options)
        plain, term = (as_errors(pairs) for _ in range(2))
        found = gradients(OBJECTIVES["poly"].loss(term, beta=5000.0, poly_weight=0.0), term)
        for field, gradient in gradients(OBJECTIVES["dpo"].loss(plain, **options), plain).items():
            assert torch.equal(found[field], gradient)


def test_alpha_of_a_small_exponent_is_poly_of_minus_1() -> None:
    """a -> 0 is -log s - (1 - s); a -> 1 is s log s + 1 - s, which is no divergence of a surely wrong label's size."""
    pairs = some_pairs()
    least = losses("alpha", pairs, {"beta": 500.0, "mean_probability": 0.0})
    assert least == pytest.approx(losses("poly", pairs, {"beta": 500.0, "poly_weight": -1.0}), rel=1e-9)
    probabilities = [sigma(-250 * (pair.d_w - pair.d_l)) for pair in pairs]
    most = losses("alpha", pairs, {"beta": 500.0, "alpha_scale": 1 - 1e-9, "mean_probability": 1.0})
    assert most == pytest.approx([s * log(s) + 1 - s for s in probabilities], rel=1e-6, abs=1e-9)


def test_linear_keeps_eta_of_pairs_that_are_told_apart_and_reads_the_gap_alone() -> None:
    # 0.2 x 1000 x D = -0.5 at D = -0.0025: from there on the weight is eta
    far, near = Pair(0.3, 0.1, -0.01, 0.0, 0, 0, 0), Pair(0.3, 0.1, -0.0005, 0.0, 0, 0, 0)
    assert losses("linear", [far, near], {"beta": 1000.0, "eta": 0.1}) == pytest.approx([0.1 * 0.2, 0.4 * 0.2])


def test_orpo_raises_the_rejected_error_where_diffusers_lowers_it() -> None:
    """At m_w 0.12, m_l 0.10 and weight 0.1 diffusers' form has the derivative +0.0495 by m_l."""
    errors = as_errors([Pair(0.12, 0.10, 0, 0, 0, 0, 0)])
    found = gradients(orpo(errors, ratio_weight=0.1), errors)
    assert found["policy_rejected_error"].item() == pytest.approx(-0.1 * sigma(0.02), rel=1e-12)
    assert found["policy_chosen_error"].item() == pytest.approx(1 + 0.1 * sigma(0.02), rel=1e-12)


def test_sft_is_the_chosen_error_and_nothing_else() -> None:
    alone = PairErrors(policy_chosen_error=torch.tensor([0.25, 0.5]), target_probability=torch.ones(2))
    assert sft(alone).tolist() == [0.25, 0.5]
