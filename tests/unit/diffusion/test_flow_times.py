"""Which times a flow draws: against diffusers' own sampling times, and against each distribution's definition.

A shift above 1 moves times towards noise. Time t is the index of sigma (t + 1) / 1000.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.data.stream.draws import draw_pair
from ds_dpo.diffusion.flow import Flow
from ds_dpo.diffusion.noising import noising_of
from ds_dpo.diffusion.shift import Shift, ShiftByTokens, shifted
from ds_dpo.diffusion.timesteps import TimestepDistribution, timestep_distribution

UNIFORM = DiffusionConfig()
LOGIT_NORMAL = DiffusionConfig(timestep_sampling="logit_normal", logit_mean=0, logit_std=1)
FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
AT_512, AT_1024 = (16, 64, 64), (16, 128, 128)
LAST = float(np.nextafter(1, 0))
MANY = 200_000


def quartiles(timesteps: TimestepDistribution) -> list[int]:
    return [timesteps.quantile(share) for share in (0.25, 0.5, 0.75)]


def times_of(config: dict[str, object], *, tokens: int) -> list[float]:
    """The quartiles of the times at which diffusers' sampler calls a model in 1000 steps, from clean to noisy."""
    sampler = FlowMatchEulerDiscreteScheduler(**config)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    sigmas = np.linspace(1, 1 / 1000, 1000)
    sampler.set_timesteps(sigmas=sigmas, **({"mu": mu} if config.get("use_dynamic_shifting") else {}))
    times = sampler.timesteps.flip(0)
    return [times[int(share * 1000)].item() for share in (0.25, 0.5, 0.75)]


@pytest.mark.parametrize(
    ("config", "shift", "latent", "median"),
    [
        ({"shift": 1.0}, Shift(), AT_1024, 501),
        ({"shift": 3.0}, Shift(factor=3), AT_1024, 751),
        (FLUX, Shift(by_tokens=ShiftByTokens()), AT_512, 653),
        (FLUX, Shift(by_tokens=ShiftByTokens()), AT_1024, 760),
        ({**FLUX, "time_shift_type": "linear"}, Shift(by_tokens=ShiftByTokens(exponential=False)), AT_1024, 535),
    ],
)
def test_drawn_times_have_the_quartiles_of_the_samplers_own(
    config: dict[str, object], shift: Shift, latent: tuple[int, int, int], median: int
) -> None:
    timesteps = noising_of(UNIFORM, Flow(shift=shift)).timesteps.at(latent)
    found = [quartile + 1 for quartile in quartiles(timesteps)]  # of times 1000 sigma
    assert found[1] == median
    np.testing.assert_allclose(found, times_of(config, tokens=latent[1] * latent[2] // 4), rtol=0, atol=1.5)


def test_a_shift_above_1_moves_towards_noise_and_below_1_towards_clean_images() -> None:
    """Of uniform times, whose median sigma is 1/2: 3/2 / (1 + 2/2) = 3/4, and 1/6 / (1 - 1/3) = 1/4."""
    medians = [
        quartiles(timestep_distribution(UNIFORM, num_train_timesteps=1000, shift_factor=k))[1] for k in (3, 1 / 3)
    ]
    assert medians == [750, 250]
    assert shifted(0.5, 3) == pytest.approx(0.75)
    assert shifted(shifted(0.3, 3), 1 / 3) == pytest.approx(0.3)
    assert [shifted(edge, k) for k in (1 / 3, 0.1, 7.7) for edge in (0.0, 1.0)] == 3 * [0.0, 1.0]


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.5])
@pytest.mark.parametrize(
    "diffusion",
    [
        UNIFORM,
        LOGIT_NORMAL,
        DiffusionConfig(timestep_sampling="logit_normal", logit_mean=-0.7, logit_std=0.6),
        *(DiffusionConfig(timestep_sampling="mode", mode_scale=scale) for scale in (1.29, -1.0, 2 / (math.pi - 2))),
    ],
    ids=lambda diffusion: f"{diffusion.timestep_sampling} {diffusion.logit_mean or diffusion.mode_scale}",
)
def test_each_distribution_is_that_of_diffusers_times_that_are_shifted(
    diffusion: DiffusionConfig, factor: float
) -> None:
    """Times from many draws of diffusers' own function, then moved; the largest gap of both distributions is small."""
    torch.manual_seed(0)
    times = compute_density_for_timestep_sampling(
        {"uniform": "none"}.get(diffusion.timestep_sampling, diffusion.timestep_sampling),
        MANY,
        logit_mean=diffusion.logit_mean,
        logit_std=diffusion.logit_std,
        mode_scale=diffusion.mode_scale,
    ).double()
    times = factor * times / (1 + (factor - 1) * times)
    expected = np.bincount((times * 1000).long().clamp(max=999), minlength=1000).cumsum() / MANY
    ours = timestep_distribution(diffusion, num_train_timesteps=1000, shift_factor=factor)
    cumulative = ours.cumulative or np.arange(1, 1001) / 1000
    assert np.abs(np.array(cumulative) - expected).max() < 1.95 / math.sqrt(MANY)  # Kolmogorov-Smirnov, once in 1000
    assert cumulative[-1] == 1
    assert max(ours.quantile(0), ours.quantile(LAST)) <= 999


def test_a_range_keeps_the_proportions_of_shifted_times() -> None:
    """Of uniform times with shift 3, s' <= x has the probability x / (x + 3 (1 - x)): 0.1 at 0.25, 1/7 at 1/3."""
    diffusion = DiffusionConfig(min_timestep=250, max_timestep=499)
    ours = timestep_distribution(diffusion, num_train_timesteps=1000, shift_factor=3)
    assert ours.cumulative is not None
    below = [x / (x + 3 * (1 - x)) for x in (0.25, 0.4, 0.5)]
    assert ours.cumulative[149] == pytest.approx((below[1] - below[0]) / (below[2] - below[0]))
    assert list(ours.values) == list(range(250, 500))


def test_a_pairs_times_follow_the_size_of_its_bucket_and_keep_its_quantile() -> None:
    """A larger image of the same pair is noised more, because the same number is read off another distribution."""
    noising = noising_of(LOGIT_NORMAL, Flow(shift=Shift(by_tokens=ShiftByTokens())))

    def drawn(latent_shape: tuple[int, int, int], pair_id: int) -> int:
        return draw_pair(seed=1, pair_id=pair_id, visit=0, latent_shape=latent_shape, noising=noising).timestep

    small, large = (16, 32, 32), (16, 64, 64)
    number = 400
    draws = {shape: [drawn(shape, pair_id) for pair_id in range(number)] for shape in (small, large)}
    assert all(a < b for a, b in zip(draws[small], draws[large], strict=True))
    # tokens 256 and 1024: mu 0.5 and 0.63; a logit-normal time of mean 0 that is shifted by e^mu has mean mu
    for shape, mu in ((small, 0.5), (large, 0.63)):
        logits = [math.log((t + 0.5) / (1000 - t - 0.5)) for t in draws[shape]]
        assert sum(logits) / number == pytest.approx(mu, abs=4 / math.sqrt(number))
    assert noising.timesteps.at(small) is noising.timesteps.at(small), "computed once"
