import numpy as np
import pytest

from ds_dpo.feedback.relabel.agreement import agreement, agreement_matrix, kappa, unanimous_share

NAN = float("nan")


def test_agreement_by_hand() -> None:
    labels = np.array([1, 0, 1, 0.5, NAN, 1, 1])
    human = np.array([1, 0, 0, 1, 1, 0.5, NAN])
    found = agreement(labels, human, np.array([3, -2, 0.5, 0, 9, 9, 9]))
    assert found.pairs == 4  # a tie or no label of people is no verdict
    assert found.accuracy == (1 + 1 + 0 + 0.5) / 4
    # of the three that both decide: observed 2/3; own 2/3 lower, human 1/3: 2/9 + 2/9 by chance
    assert found.kappa == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    assert [(one.low, one.high, one.pairs, one.accuracy) for one in found.deciles] == [
        (0, 0, 1, 0.5), (0.5, 0.5, 1, 0), (2, 2, 1, 1), (3, 3, 1, 1)
    ]  # fmt: skip


def test_deciles_hold_a_tenth_of_the_pairs_each() -> None:
    margins = np.arange(1.0, 101)
    human = np.ones(100)
    labels = (margins > 30).astype(float)
    found = agreement(labels, human, -margins[::-1])
    assert [one.pairs for one in found.deciles] == [10] * 10
    # margins[::-1]: pair 99 has the smallest one, and pairs 0 to 29 the three largest tenths
    assert [one.accuracy for one in found.deciles] == [1] * 7 + [0] * 3


def test_kappa_of_cohen_s_own_formula() -> None:
    assert kappa(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0])) == 0
    assert kappa(np.array([1, 0]), np.array([1, 0])) == 1
    assert kappa(np.array([1, 0]), np.array([0, 1])) == -1
    assert kappa(np.array([1, 1]), np.array([1, 1])) is None
    assert kappa(np.array([0.5]), np.array([1])) is None


def test_scorers_among_each_other() -> None:
    labels = {"a": np.array([1, 0, 1, NAN]), "b": np.array([1, 1, 0, 1]), "c": np.array([1, 0, 0, 1])}
    assert unanimous_share(np.stack(list(labels.values()))) == 1 / 3
    found = agreement_matrix(labels)
    assert (found["a"]["b"], found["a"]["c"], found["b"]["c"]) == (1 / 3, 2 / 3, 3 / 4)
    assert found["b"]["a"] == found["a"]["b"]
