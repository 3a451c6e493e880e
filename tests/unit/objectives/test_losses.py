"""Objectives against their closed forms, and their gradients against derivatives taken by hand."""

from math import log
from typing import Any

import pytest
import torch
from closed_forms import CASES, CLOSED_FORMS, CLOSED_UTILITIES, TAKING_SOFT_TARGETS, sigma
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


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "sdpo"])
def test_gradients_are_those_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    """sdpo's is not its value's, on purpose: see its closed form."""
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
    (kto,) = losses("kto", [start], {"beta": 5000.0})
    assert kto == 0.5


def test_orpo_raises_the_rejected_error_where_diffusers_lowers_it() -> None:
    """At m_w 0.12, m_l 0.10 and weight 0.1 diffusers' form has the derivative +0.0495 by m_l."""
    errors = as_errors([Pair(0.12, 0.10, 0, 0, 0, 0, 0)])
    found = gradients(orpo(errors, ratio_weight=0.1), errors)
    assert found["policy_rejected_error"].item() == pytest.approx(-0.1 * sigma(0.02), rel=1e-12)
    assert found["policy_chosen_error"].item() == pytest.approx(1 + 0.1 * sigma(0.02), rel=1e-12)


def test_sft_is_the_chosen_error_and_nothing_else() -> None:
    alone = PairErrors(policy_chosen_error=torch.tensor([0.25, 0.5]), target_probability=torch.ones(2))
    assert sft(alone).tolist() == [0.25, 0.5]
