import math

import pytest

from ds_dpo.evaluation.votes.agreement import Agreement, cohen, fleiss


def test_cohen_by_hand() -> None:
    """50 pairs: both say 1 in 20, only the first in 5, only the second in 10, none in 15: (0.7 - 0.5) / (1 - 0.5)."""
    one = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    found = cohen(one, other, ("a", "b"))
    assert (found.one, found.other, found.n, found.same) == ("a", "b", 50, 0.7)
    assert found.kappa == pytest.approx(0.4, abs=1e-12)


def test_ties_are_an_outcome_of_their_own() -> None:
    """Same in 2 of 3; chance is 1/3 * 1/3 for 1, 1/3 * 2/3 for a tie, 0 for 0: (2/3 - 1/3) / (1 - 1/3)."""
    assert cohen([1, 0.5, 0], [1, 0.5, 0.5], ("a", "b")).kappa == pytest.approx(0.5)


@pytest.mark.parametrize(("outcomes", "same"), [([], None), ([1, 1], 1.0)])
def test_kappa_can_be_undefined(outcomes: list[float], same: float | None) -> None:
    expected = Agreement(one="a", other="b", n=len(outcomes), same=same, kappa=None)
    assert cohen(outcomes, outcomes, ("a", "b")) == expected
    assert fleiss([[each, each] for each in outcomes]) == (len(outcomes), None)


def test_fleiss_of_a_published_table() -> None:
    """14 raters, 10 subjects, 5 categories: kappa is 0.210 (the worked example in Wikipedia's Fleiss' kappa)."""
    table = """0 0 0 0 14
    0 2 6 4 2
    0 0 3 5 6
    0 3 9 2 0
    2 2 8 1 1
    7 7 0 0 0
    3 2 6 3 0
    2 5 3 2 2
    6 5 2 1 0
    0 2 2 3 7"""
    pairs = [
        [float(category) for category, count in enumerate(map(int, line.split())) for _ in range(count)]
        for line in table.splitlines()
    ]
    num_pairs, kappa = fleiss([*pairs, [1.0]])  # one outcome alone agrees with nothing
    assert num_pairs == 10
    assert kappa is not None
    assert math.isclose(kappa, 0.210, abs_tol=5e-4)
