import numpy as np
import pytest

from ds_dpo.evaluation.statistics.paired import compare_paired

DRAWS = 2000
RESAMPLES = 2000


def test_figures_by_hand() -> None:
    # a: +2, +1 (won); b: 0, 0 (tied); c: -1, +4 (one each: tied); d: -2, 0 (lost)
    differences = [2, 1, 0, 0, -1, 4, -2, 0]
    rival = np.arange(8.0)
    found = compare_paired(rival + differences, rival, [*"aabbccdd"])
    assert (found.n, found.num_prompts) == (8, 4)
    assert found.win_rate.mean == (3 + 0.5 * 3) / 8
    assert found.difference.mean == 0.5
    assert found.median_difference == 0
    assert found.p_value == 1  # one prompt won, one lost
    assert found.prompts_needed is None


def test_prompts_won_are_what_the_sign_test_counts() -> None:
    own = [1.0] * 8 + [0.0, 0.0, 0.5]
    found = compare_paired(own, [0.5] * 11, [f"p{place}" for place in range(11)])
    assert found.p_value == pytest.approx(2 * 56 / 1024)  # 8 of 10, one tie
    assert found.prompts_needed == pytest.approx(24, abs=0)  # 7.8489 / (4 * 0.3**2) = 21.80, times 11 / 10 = 23.98


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [12, 60])
def test_intervals_cover_what_they_claim(num_prompts) -> None:
    """95 % +- 1.5 of 2,000 draws, for a win rate with ties and for a mean difference, four images a prompt."""
    generator = np.random.default_rng(11)
    prompts = [f"p{place}" for place in range(num_prompts) for _ in range(4)]
    covered = np.zeros(2)
    for _ in range(DRAWS):
        # the prompt moves all of its images, so they are not independent; scores are rounded, so there are ties
        chance = generator.uniform(0.3, 0.9, size=(num_prompts, 1))
        uniform = generator.random((num_prompts, 4))
        step = np.where(uniform < 0.8 * chance, 1, np.where(uniform < 0.8 * chance + 0.2, 0, -1))
        # true win rate: 0.8 * 0.6 + 0.1; the size of a difference is 1 to 3, mean 2, independent of its sign
        size = generator.integers(1, 4, size=step.shape)
        found = compare_paired((step * size).ravel(), np.zeros(step.size), prompts, resamples=RESAMPLES)
        true_mean = 2 * (0.8 * 0.6 - 0.8 * 0.4)
        covered += (
            found.win_rate.low <= 0.58 <= found.win_rate.high,
            found.difference.low <= true_mean <= found.difference.high,
        )
    assert covered / DRAWS == pytest.approx(0.95, abs=0.015)
