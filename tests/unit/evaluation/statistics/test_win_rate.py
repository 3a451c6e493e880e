import random

import numpy as np
import pytest

from ds_dpo.evaluation.statistics.bootstrap import bootstrap_interval
from ds_dpo.evaluation.statistics.win_rate import win_rate


def test_wins_count_one_ties_a_half_and_the_margin_both_ways() -> None:
    # differences: 1 (won by the margin), 0 (tie), -0.05 (lost, within the margin), -0.5 (lost by the margin)
    found = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 3.05, 4.5], ["a", "a", "b", "b"], margin=0.1)
    assert found.rate == (1 + 0.5) / 4
    assert found.win_by_margin == 1 / 4
    assert found.loss_by_margin == 1 / 4


def test_a_difference_of_exactly_the_margin_is_within_it() -> None:
    found = win_rate([1.5, 1.0], [1.0, 1.5], ["a", "b"], margin=0.5)
    assert (found.rate, found.win_by_margin, found.loss_by_margin) == (0.5, 0, 0)


def test_the_rival_has_the_complement() -> None:
    generator = np.random.default_rng(0)
    own, rival = generator.integers(0, 4, (2, 30)).astype(float)
    prompts = [f"p{place // 3}" for place in range(30)]
    there, back = win_rate(own, rival, prompts, margin=1), win_rate(rival, own, prompts, margin=1)
    assert there.rate + back.rate == pytest.approx(1)
    assert (there.win_by_margin, there.loss_by_margin) == (back.loss_by_margin, back.win_by_margin)
    assert there.low + back.high == pytest.approx(1)


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.025**0.1, 1), (-1.0, 0, 1 - 0.025**0.1)])
def test_a_win_of_all_prompts_is_no_certainty(score, low, high) -> None:
    # if 69 % of prompts are won, ten of ten are won with a probability of 2.5 %: 0.6915**10 = 0.025
    found = win_rate([score] * 20, [0.0] * 20, [f"p{place // 2}" for place in range(20)], margin=0.1)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_same_scores_are_a_certain_half() -> None:
    found = win_rate([1, 2, 3], [1, 2, 3], ["a", "b", "c"], margin=0.1)
    assert (found.rate, found.low, found.high) == (0.5, 0.5, 0.5)


def test_many_images_of_few_prompts_are_no_certainty() -> None:
    # one prompt always won, one always lost: a quarter of the resamples is all lost, a quarter all won
    won = [1.0] * 500 + [0.0] * 500
    found = win_rate(won, [0.5] * 1000, ["a"] * 500 + ["b"] * 500, margin=0.1)
    assert (found.rate, found.low, found.high) == (0.5, 0, 1)


def test_a_prompt_counts_with_all_its_images() -> None:
    # a: one image of 1; b: three of 0. Resamples: aa 1 (1/4), ab and ba 1/4 (1/2), bb 0 (1/4)
    found = bootstrap_interval([1, 0, 0, 0], ["a", "b", "b", "b"])
    assert (found.mean, found.low, found.high) == (0.25, 0, 1)
    # with ten more prompts, a resample of a alone has a probability of 12**-12
    assert bootstrap_interval([1, 0, 0, 0] + [0] * 10, ["a", "b", "b", "b", *"cdefghijkl"]).high < 1


def test_the_interval_is_that_of_an_independent_bootstrap() -> None:
    generator = np.random.default_rng(3)
    values = (generator.normal(size=(24, 1)) + 0.5 * generator.normal(size=(24, 8))).round(3)
    found = bootstrap_interval(values.ravel(), [f"p{place}" for place in range(24) for _ in range(8)])

    dice, rows, means = random.Random(4), values.tolist(), []
    for _ in range(10_000):
        drawn = [value for _ in rows for value in dice.choice(rows)]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    assert found.mean == pytest.approx(values.mean())
    # 24 prompts: the normal distribution below -2.0687 (t of 23 degrees of freedom) * sqrt(24 / 23) = -2.1132 is 0.0173
    assert found.low == pytest.approx(means[173], abs=0.02)
    assert found.high == pytest.approx(means[9827], abs=0.02)
    # resampling images would claim far too much: its interval is about 1/2.5 as wide
    by_image = 2 * 1.96 * values.std() / values.size**0.5
    assert found.high - found.low > 2 * by_image


def test_the_order_of_images_does_not_matter_and_the_seed_decides() -> None:
    values, prompts = [0.1, 0.9, 0.4, 0.3, 0.7, 0.2], ["a", "a", "b", "b", "c", "c"]
    order = [5, 3, 1, 0, 2, 4]
    shuffled = bootstrap_interval([values[place] for place in order], [prompts[place] for place in order])
    found = bootstrap_interval(values, prompts)
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high))
    assert bootstrap_interval(values, prompts) == found


@pytest.mark.parametrize(
    ("own", "rival", "prompts", "margin", "message"),
    [
        ([1.0, 2.0], [1.0], ["a", "b"], 0.1, r"shape \(1,\) for 2 prompts"),
        ([1.0], [1.0], ["a", "b"], 0.1, r"shape \(1,\) for 2 prompts"),
        ([[1.0, 2.0]], [[1.0, 2.0]], ["a", "b"], 0.1, r"shape \(1, 2\)"),
        ([], [], [], 0.1, "0 prompts"),
        ([1.0, 2.0], [1.0, 2.0], ["a", "a"], 0.1, "1 prompts"),
        ([1.0, float("nan")], [1.0, 2.0], ["a", "b"], 0.1, "score 1 is nan"),
        ([1.0, 2.0], [float("inf"), 2.0], ["a", "b"], 0.1, "score 0 is inf"),
        ([1.0, 2.0], [1.0, 2.0], ["a", "b"], -0.1, "margin -0.1"),
        ([1.0, 2.0], [1.0, 2.0], ["a", "b"], float("nan"), "margin nan"),
    ],
)
def test_refuses_what_has_no_win_rate(own, rival, prompts, margin, message) -> None:
    with pytest.raises(ValueError, match=message):
        win_rate(own, rival, prompts, margin=margin)
