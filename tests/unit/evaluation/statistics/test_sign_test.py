import itertools
import math

import pytest

from ds_dpo.evaluation.statistics.sign_test import holm, prompts_needed, sign_test


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 2, 2 * (45 + 10 + 1) / 1024),  # the binomial coefficients of 10 above 8, 9, 10
        (1, 9, 2 * (10 + 1) / 1024),
    ],
)
def test_sign_test_is_the_closed_form(wins, losses, expected) -> None:
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-14)


def test_sign_test_is_what_counting_all_coins_gives() -> None:
    for tosses in range(1, 11):
        heads = [sum(coins) for coins in itertools.product((0, 1), repeat=tosses)]
        for wins in range(tosses + 1):
            as_uneven = sum(abs(2 * each - tosses) >= abs(2 * wins - tosses) for each in heads)
            assert sign_test(wins, tosses - wins) == pytest.approx(as_uneven / len(heads), rel=1e-14)


def test_sign_test_holds_for_thousands_of_prompts() -> None:
    # scipy.stats.binomtest(1700, 3200).pvalue, scipy 1.17.1
    assert sign_test(1700, 1500) == pytest.approx(0.00043334035939974455, rel=1e-12)
    assert sign_test(3200, 0) == pytest.approx(0.0, abs=1e-300)


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "expected"),
    [
        (5, 5, 3, None),
        (0, 0, 8, None),
        (60, 40, 0, 197),  # (1.959964 + 0.841621)**2 / (4 * 0.1**2) = 196.22
        (60, 40, 100, 393),  # half of the prompts decide: 392.44
        (40, 60, 0, 197),
        (10, 0, 0, 8),  # 7.8489 / (4 * 0.25) = 7.85
        (20, 0, 20, 16),
    ],
)
def test_prompts_needed_by_hand(wins, losses, ties, expected) -> None:
    assert prompts_needed(wins, losses, ties) == expected


@pytest.mark.parametrize("share", [0.55, 0.6, 0.7])
def test_that_number_of_prompts_gives_the_power(share) -> None:
    needed = prompts_needed(round(100 * share), round(100 * (1 - share)), 0)
    power = sum(
        math.comb(needed, wins) * share**wins * (1 - share) ** (needed - wins)
        for wins in range(needed + 1)
        if sign_test(wins, needed - wins) < 0.05
    )
    assert power == pytest.approx(0.8, abs=0.06)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.4: times 4, 3, 2, 1, and never below the one before
    assert holm([0.02, 0.4, 0.01, 0.03]) == pytest.approx([0.06, 0.4, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
