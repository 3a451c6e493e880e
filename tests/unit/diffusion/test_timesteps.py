"""Which timesteps are drawn: each distribution against its own formula, and the rules between its options."""

from math import erf, sqrt

import numpy as np
import pytest

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.diffusion.timesteps import TimestepDistribution, timestep_distribution
from ds_dpo.errors import ConfigError


def distribution(num_train_timesteps=1000, **options):
    return timestep_distribution(DiffusionConfig(**options), num_train_timesteps=num_train_timesteps)


def drawn(times, **options):
    each, generator = distribution(**options), np.random.Generator(np.random.Philox(7))
    return np.array([each.draw(generator) for _ in range(times)])


def below(timestep, *, mean, std, num_train_timesteps=1000):
    """P(floor(T sigmoid(z)) < t) of a normal z, by the error function."""
    if timestep in (0, num_train_timesteps):
        return float(timestep > 0)
    share = timestep / num_train_timesteps
    return 0.5 * (1 + erf((np.log(share / (1 - share)) - mean) / std / sqrt(2)))


def test_the_default_is_any_timestep_alike():
    assert distribution() == TimestepDistribution(values=range(1000))
    counts = np.bincount(drawn(20000), minlength=1000)
    assert len(counts) == 1000
    assert ((counts - 20) ** 2 / 20).sum() < 1143.9  # chi-squared, 999 degrees of freedom, once in 1000


def test_a_range_holds_both_of_its_ends_and_nothing_else():
    assert set(drawn(200, min_timestep=7, max_timestep=10).tolist()) == {7, 8, 9, 10}
    assert drawn(3, min_timestep=7, max_timestep=7).tolist() == [7, 7, 7]
    assert set(drawn(200, min_timestep=997).tolist()) == {997, 998, 999}


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.2, 0.5), (-0.8, 2.0)])
def test_logit_normal_has_its_distribution(mean, std):
    each = distribution(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    expected = [below(timestep + 1, mean=mean, std=std) for timestep in range(1000)]
    np.testing.assert_allclose(each.cumulative, expected, rtol=0, atol=1e-12)
    times = 20000
    timesteps = drawn(times, timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    empirical = np.bincount(timesteps, minlength=1000).cumsum() / times
    assert np.abs(empirical - expected).max() < 1.95 / sqrt(times)  # Kolmogorov-Smirnov, once in 1000


def test_a_higher_mean_draws_noisier_timesteps():
    middle = [
        distribution(timestep_sampling="logit_normal", logit_mean=mean, logit_std=1).quantile(0.5)
        for mean in (-1, 0, 1)
    ]
    assert middle == [268, 500, 731]  # 1000 / (1 + e), 1000 / 2, 1000 e / (1 + e): 268.9, 500, 731.06


def test_logit_normal_keeps_its_proportions_inside_a_range():
    whole = {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 1.0}
    each = distribution(**whole, min_timestep=100, max_timestep=199)
    start, end = (below(edge, mean=0.5, std=1) for edge in (100, 200))
    expected = [(below(timestep + 1, mean=0.5, std=1) - start) / (end - start) for timestep in range(100, 200)]
    np.testing.assert_allclose(each.cumulative, expected, rtol=0, atol=1e-10)
    timesteps = drawn(2000, **whole, min_timestep=100, max_timestep=199)
    assert (timesteps.min(), timesteps.max()) >= (100, 190)
    assert timesteps.max() <= 199


def test_turbo_draws_the_four_timesteps_of_the_authors():
    timesteps = drawn(4000, timestep_sampling="turbo")
    values, counts = np.unique(timesteps, return_counts=True)
    assert values.tolist() == [249, 499, 749, 999]
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi-squared, 3 degrees of freedom, once in 1000
    assert set(drawn(100, timestep_sampling="turbo", min_timestep=300, max_timestep=749).tolist()) == {499, 749}
    assert distribution(100, timestep_sampling="turbo").values == (24, 49, 74, 99)


def test_quantiles_are_a_grid_that_is_spread_as_draws_are():
    assert [distribution().quantile((decile + 0.5) / 10) for decile in range(10)] == list(range(50, 1000, 100))
    assert [distribution(timestep_sampling="turbo").quantile(share) for share in (0, 0.3, 0.6, 0.99)] == [
        *(249, 499, 749, 999)
    ]
    normal = distribution(timestep_sampling="logit_normal", logit_mean=0, logit_std=1)
    for share in (0.0, 0.1, 0.37, 0.999999, np.nextafter(1, 0)):
        timestep = normal.quantile(share)
        assert below(timestep, mean=0, std=1) <= share < below(timestep + 1, mean=0, std=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_timestep": 1000}, "max_timestep 1000: the model has timesteps 0 to 999"),
        ({"min_timestep": 1000}, "min_timestep 1000: the model has timesteps 0 to 999"),
        (
            {"timestep_sampling": "turbo", "max_timestep": 248},
            "turbo draws 249, 499, 749, 999, none of which is between",
        ),
        (
            {"timestep_sampling": "logit_normal", "logit_mean": 8, "logit_std": 0.5, "max_timestep": 199},
            "logit_mean 8 with logit_std 0.5 gives a share of",
        ),
    ],
)
def test_what_the_model_or_the_range_does_not_have_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        distribution(**options)
