"""From margins to labels, by hand. Columns are pairs; 1 is the lower image, 0 the higher one."""

import numpy as np
import pytest

from ds_dpo.feedback.relabel.verdicts import Verdicts, combine, common_margin, votes, with_human_labels

NAN = float("nan")
MARGINS = np.array(
    [
        [2.0, -1.0, 0.0, 4.0, NAN],
        [0.1, -0.3, 0.2, -0.2, 0.1],
        [30.0, -10.0, -20.0, 20.0, 10.0],
    ]
)


def test_votes_are_signs() -> None:
    assert votes(MARGINS[0]).tolist()[:4] == [1, 0, 0.5, 1]
    assert np.isnan(votes(MARGINS[0])[4])


def test_a_common_margin_is_in_units_of_each_scorer_s_median() -> None:
    # medians of |margin| that are not 0: 2, 0.2, 20
    expected = [(1 + 0.5 + 1.5) / 3, (-0.5 - 1.5 - 0.5) / 3, (0 + 1 - 1) / 3, (2 - 1 + 1) / 3]
    assert common_margin(MARGINS)[:4] == pytest.approx(expected)
    assert np.isnan(common_margin(MARGINS)[4])
    assert common_margin(MARGINS[:1])[:4].tolist() == [2, -1, 0, 4]


@pytest.mark.parametrize(
    ("options", "labels", "probabilities"),
    [
        ({"combination": "vote"}, [1, 0, 0.5, 1, NAN], [1, 0, 0.5, 2 / 3, NAN]),
        ({"combination": "unanimous"}, [1, 0, NAN, NAN, NAN], [1, 0, NAN, NAN, NAN]),
        ({"combination": "vote", "least_margin": 0.8}, [1, 0, NAN, NAN, NAN], [1, 0, NAN, NAN, NAN]),
    ],
)
def test_combined_verdicts(options, labels, probabilities) -> None:
    found = combine(MARGINS, votes(MARGINS), **options)
    assert found.label.tolist() == pytest.approx(labels, nan_ok=True)
    assert found.probability.tolist() == pytest.approx(probabilities, nan_ok=True)


def test_turning_all_pairs_round_turns_all_labels_round() -> None:
    found, turned = (combine(sign * MARGINS, votes(sign * MARGINS), combination="vote") for sign in (1, -1))
    assert turned.label.tolist() == pytest.approx((1 - found.label).tolist(), nan_ok=True)
    assert turned.probability.tolist() == pytest.approx((1 - found.probability).tolist(), nan_ok=True)


@pytest.mark.parametrize(
    ("use", "labels", "probabilities"),
    [
        ("replace", [1, 1, 0, 1, NAN], [0.9, 0.8, 0.3, 0.6, NAN]),
        ("keep", [1, 0, 0, 1, 0], [1, 0, 0.3, 0.6, 0]),
        ("confirm", [1, NAN, NAN, NAN, NAN], [0.9, NAN, NAN, NAN, NAN]),
    ],
)
def test_human_labels_have_their_say(use, labels, probabilities) -> None:
    found = Verdicts(
        label=np.array([1, 1, 0, 1, NAN]), margin=np.ones(5), probability=np.array([0.9, 0.8, 0.3, 0.6, NAN])
    )
    human = np.array([1, 0, 0.5, NAN, 0])
    result = with_human_labels(found, human, use)
    assert result.label.tolist() == pytest.approx(labels, nan_ok=True)
    assert result.probability.tolist() == pytest.approx(probabilities, nan_ok=True)
