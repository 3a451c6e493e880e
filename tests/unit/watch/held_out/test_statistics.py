"""Estimates of held-out pairs against numbers worked out by hand, and intervals against their definitions.

Two pairs, two deciles, one draw. The start's errors are 1 everywhere.

          chosen difference   rejected difference    gap (chosen - rejected)
pair 0      -0.1   0.0           0.1   0.0              -0.2   0.0
pair 1       0.2   0.1           0.1   0.4               0.1  -0.3
"""

import math
from statistics import NormalDist

import numpy as np
import pytest

from ds_dpo.watch.held_out.statistics import GridErrors, normal_interval, share_interval, summarize


def two_pairs() -> GridErrors:
    ones = np.ones((2, 2, 1))
    chosen = np.array([[[-0.1], [0.0]], [[0.2], [0.1]]])
    rejected = np.array([[[0.1], [0.0]], [[0.1], [0.4]]])
    return GridErrors(chosen=1 + chosen, rejected=1 + rejected, start_chosen=ones, start_rejected=ones)


def test_means_are_those_of_the_table() -> None:
    found = summarize(two_pairs(), beta=10)
    means = {name: estimate.mean for name, estimate in found.overall.items()}
    assert means["accuracy"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert means["margin"] == pytest.approx((0.2 + 0 - 0.1 + 0.3) / 4)
    assert means["chosen_difference"] == pytest.approx(0.05)
    assert means["rejected_difference"] == pytest.approx(0.15)
    assert means["policy_chosen_error"] == pytest.approx(1.05)
    assert means["policy_rejected_error"] == pytest.approx(1.15)
    logits = [1.0, 0.0, -0.5, 1.5]  # beta / 2 x margin
    assert means["loss"] == pytest.approx(sum(math.log(1 + math.exp(-u)) for u in logits) / 4)
    assert means["gradient_factor"] == pytest.approx(sum(1 / (1 + math.exp(u)) for u in logits) / 4)
    first, second = ({name: estimate.mean for name, estimate in decile.items()} for decile in found.deciles)
    assert (first["accuracy"], second["accuracy"]) == pytest.approx((0.5, 0.75))
    assert (first["margin"], second["margin"]) == pytest.approx((0.05, 0.15))


def test_pairs_are_the_unit_of_an_interval() -> None:
    """The two pairs' mean margins are 0.1 and 0.1: no spread between pairs, however much their draws differ."""
    margin = summarize(two_pairs(), beta=None).overall["margin"]
    assert (margin.low, margin.high) == pytest.approx((margin.mean, margin.mean))


def test_what_needs_a_beta_is_left_out_without_one() -> None:
    assert not {"loss", "gradient_factor"} & summarize(two_pairs(), beta=None).overall.keys()


def test_normal_interval_is_1_96_standard_errors_to_both_sides() -> None:
    found = normal_interval(np.array([1.0, 2.0, 4.0, 9.0]))
    # deviations -3, -2, 0, 5: variance 38 / 3
    half = NormalDist().inv_cdf(0.975) * math.sqrt(38 / 3 / 4)
    assert (found.mean, found.low, found.high) == pytest.approx((4, 4 - half, 4 + half))


@pytest.mark.parametrize(("agreed", "number"), [(0, 9), (3, 9), (9, 9), (40, 44)])
def test_share_of_single_outcomes_has_wilsons_interval(agreed: int, number: int) -> None:
    """Its ends are the shares q from which the mean p lies z standard errors away: (p - q)^2 = z^2 q (1 - q) / n."""
    mean, z = agreed / number, NormalDist().inv_cdf(0.975)
    low, high = sorted(np.roots([1 + z * z / number, -2 * mean - z * z / number, mean * mean]))
    found = share_interval(np.array([1.0] * agreed + [0.0] * (number - agreed)))
    assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high), abs=1e-12)


def test_several_draws_of_a_pair_narrow_the_interval_and_equal_pairs_do_not() -> None:
    single = share_interval(np.array([1.0, 0.0] * 10))
    several = share_interval(np.array([0.6, 0.4] * 10))
    equal = share_interval(np.full(20, 0.5))
    assert several.high - several.low < 0.3 * (single.high - single.low)
    assert (equal.low, equal.high) == pytest.approx((single.low, single.high))


def test_interval_covers_in_19_of_20_samples() -> None:
    """600 samples of 60 pairs with 10 draws of one decile: 95 % +- 3 standard errors of 0.9 %."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        of_pairs = generator.beta(4, 2, size=60)  # how clear each pair is
        values = generator.binomial(10, of_pairs) / 10
        found = share_interval(values)
        covered += found.low <= 4 / 6 <= found.high
    assert covered / 600 == pytest.approx(0.95, abs=0.027)


def test_an_error_that_is_not_finite_is_no_agreement_and_shows() -> None:
    errors = two_pairs()
    errors.chosen[0, 0, 0] = np.nan
    found = summarize(errors, beta=10).overall
    assert found["accuracy"].mean == pytest.approx((0 + 0.5 + 0 + 1) / 4)
    assert math.isnan(found["margin"].mean)
    assert math.isnan(found["margin"].low)
