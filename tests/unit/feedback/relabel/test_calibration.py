import numpy as np
import pytest

from ds_dpo.feedback.relabel.calibration import Calibration, fit, quality


def drawn(slope, offset, *, scale=1.0, pairs=20_000):
    generator = np.random.default_rng(5)
    margins = scale * generator.normal(size=pairs)
    human = (generator.random(pairs) < 1 / (1 + np.exp(-(slope * margins + offset)))).astype(float)
    return margins, human


@pytest.mark.parametrize(
    ("slope", "offset", "scale"), [(2.0, 0.0, 1.0), (0.3, 0.0, 1.0), (40.0, 0.0, 0.02), (-1.5, 0.0, 1.0), (1.0, 0.4, 1)]
)  # fmt: skip
def test_the_curve_that_made_the_labels_is_found(slope, offset, scale) -> None:
    margins, human = drawn(slope, offset, scale=scale)
    found = fit(margins, human, "platt" if offset else "temperature")
    assert found.slope == pytest.approx(slope, rel=0.06)
    assert found.offset == pytest.approx(offset, abs=0.05)


def test_no_nearby_curve_is_more_likely() -> None:
    margins, human = drawn(1.3, -0.7, pairs=300)
    found = fit(margins, human, "platt")
    wins = human.sum()
    target = np.where(human == 1, (wins + 1) / (wins + 2), 1 / (300 - wins + 2))

    def loss(slope, offset):
        chance = 1 / (1 + np.exp(-(slope * margins + offset)))
        return -(target * np.log(chance) + (1 - target) * np.log(1 - chance)).sum()

    best = loss(found.slope, found.offset)
    for slope in (-1e-3, 0, 1e-3):
        for offset in (-1e-3, 0, 1e-3):
            assert loss(found.slope + slope, found.offset + offset) >= best - 1e-9


def test_a_scorer_that_is_always_right_has_a_finite_slope() -> None:
    margins = np.linspace(-1, 1, 40)
    found = fit(margins, (margins > 0).astype(float), "temperature")
    assert 5 < found.slope < 500
    assert found.probabilities(np.array([0.0, 1.0, np.nan]))[0] == 0.5
    assert np.isnan(found.probabilities(np.array([np.nan]))[0])


@pytest.mark.parametrize(
    ("margins", "message"), [(np.ones(19), "19 pairs"), (np.zeros(30), "all margins are 0")]
)  # fmt: skip
def test_too_little_to_fit_is_refused(margins, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(margins, np.ones(len(margins)), "temperature")


def test_quality_by_hand() -> None:
    found = quality(np.array([0.9, 0.9, 0.3, 0.5]), np.array([1.0, 0.0, 0.0, 1.0]))
    assert found.pairs == 4
    assert found.log_loss == pytest.approx(-(np.log(0.9) + np.log(0.1) + np.log(0.7) + np.log(0.5)) / 4)
    # bins of confidence: 0.9 (two, one right: gap 2 * 0.9 - 1), 0.7 (right: gap 0.3), 0.5 (half right: gap 0)
    assert found.error == pytest.approx((0.8 + 0.3) / 4)


def test_probabilities_of_large_margins_do_not_overflow() -> None:
    with np.errstate(over="raise"):
        found = Calibration(slope=10, offset=0).probabilities(np.array([-1e6, 1e6]))
    assert found.tolist() == [0, 1]
