"""Objectives on pairs whose label is uncertain: ties, target probabilities below 1, and smoothed labels."""

import math
from dataclasses import replace
from math import exp, log

import pytest
from closed_forms import CLOSED_FORMS, TAKING_SOFT_TARGETS
from pairs_of_numbers import Pair, as_errors, gradients, losses, some_pairs

from ds_dpo.objectives.losses import OBJECTIVES


@pytest.mark.parametrize("name", TAKING_SOFT_TARGETS)
def test_a_tie_has_no_side_and_a_label_that_is_surely_wrong_is_the_swapped_pair_s(name: str) -> None:
    for options in CLOSED_FORMS[name][1]:
        ties = some_pairs(target=0.5)
        assert losses(name, ties, options) == pytest.approx(losses(name, [tie.swapped() for tie in ties], options))
        wrong = some_pairs(target=0.0)
        right = [replace(pair.swapped(), target=1.0) for pair in wrong]
        assert losses(name, wrong, options) == pytest.approx(losses(name, right, options), rel=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - set(TAKING_SOFT_TARGETS)))
def test_what_takes_no_soft_targets_does_not_read_them(name: str) -> None:
    options = CLOSED_FORMS[name][1][0]
    assert losses(name, some_pairs(target=0.5), options) == losses(name, some_pairs(), options)


def test_dpo_of_a_soft_target_by_hand() -> None:
    # logit 1: log sigmoid(1) = -log(1 + 1/e), log sigmoid(-1) = -log(1 + e)
    won, lost = log(1 + exp(-1)), log(1 + math.e)
    tie, likely = (Pair(0.1, 0.2, -0.001, 0.001, 0, 0, 0, target) for target in (0.5, 0.8))
    assert losses("dpo", [tie, likely], {"beta": 1000}) == pytest.approx(
        [(won + lost) / 2, 0.8 * won + 0.2 * lost], rel=1e-12
    )
    # a label that is right with 0.8 and smoothed by 0.1 is right with 0.8 x 0.9 + 0.2 x 0.1 = 0.74
    (smoothed,) = losses("dpo", [likely], {"beta": 1000, "label_smoothing": 0.1})
    assert smoothed == pytest.approx(0.74 * won + 0.26 * lost, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("dpo", {"label_smoothing": 0.1}, log(0.74 / 0.26)),
        ("dmpo", {"alpha": 0.1}, log(0.74 / 0.26)),
        ("ipo", {}, 0.8 - 0.5),
    ],
)
def test_an_uncertain_label_is_followed_as_far_as_it_is_certain(
    name: str, options: dict[str, float], least: float
) -> None:
    at_least = as_errors([Pair(0.1, 0.1, -2 * least / 1000, 0, 0, 0, 0, target=0.8)])
    found = gradients(OBJECTIVES[name].loss(at_least, beta=1000, **options), at_least)
    assert abs(found["chosen_difference"].item()) < 1e-10


def test_dpo_is_the_loss_of_the_swapped_pair_where_labels_are_smoothed() -> None:
    pair = Pair(0.1, 0.1, -0.001, 0.003, 0, 0, 0)
    own, swapped = (losses("dpo", [one], {"beta": 1000})[0] for one in (pair, pair.swapped()))
    (mixed,) = losses("dpo", [pair], {"beta": 1000, "label_smoothing": 0.1})
    assert mixed == pytest.approx(0.9 * own + 0.1 * swapped, rel=1e-12)
