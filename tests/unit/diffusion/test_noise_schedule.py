"""Noise, targets and errors against diffusers' scheduler and against plain formulas in float64."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from ds_dpo.diffusion.noise_schedule import TARGETS, NoiseSchedule, paired_error_difference, squared_error

SCHEDULER = DDPMScheduler(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
)
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


def schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(alphas_cumprod=SCHEDULER.alphas_cumprod, prediction_type=prediction_type)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS, NOISE = randn(5, 4, 8, 8, seed=0), randn(5, 4, 8, 8, seed=1)


def test_noisy_latents_are_the_schedulers() -> None:
    noisy = schedule().add_noise(LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(noisy, SCHEDULER.add_noise(LATENTS, NOISE, TIMESTEPS), rtol=0, atol=1e-6)
    # by hand: beta_0 = 0.00085, so alpha_bar_0 = 0.99915
    expected = 0.99915**0.5 * LATENTS[0].double() + 0.00085**0.5 * NOISE[0].double()
    torch.testing.assert_close(noisy[0].double(), expected, rtol=0, atol=1e-5)


def test_targets_are_noise_and_the_schedulers_velocity() -> None:
    assert torch.equal(schedule("epsilon").target(LATENTS, NOISE, TIMESTEPS), NOISE)
    velocity = schedule("v_prediction").target(LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(velocity, SCHEDULER.get_velocity(LATENTS, NOISE, TIMESTEPS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", TARGETS)
def test_a_perfect_prediction_gives_the_clean_latents_back(prediction_type: str) -> None:
    """Each target inverted by diffusers' own step: it is what a sampler of that prediction type needs."""
    sampler = DDPMScheduler.from_config(SCHEDULER.config, prediction_type=prediction_type)
    ours = schedule(prediction_type)
    for index, timestep in enumerate(TIMESTEPS[:3]):  # later ones hold too little signal for fp32
        one = slice(index, index + 1)
        t = timestep[None]
        noisy = ours.add_noise(LATENTS[one], NOISE[one], t)
        found = sampler.step(ours.target(LATENTS[one], NOISE[one], t), timestep, noisy).pred_original_sample
        torch.testing.assert_close(found, LATENTS[one], rtol=0, atol=1e-4)


def test_velocity_and_noisy_latents_give_clean_latents_and_noise_back() -> None:
    """x0 = sqrt(a) x_t - sqrt(1 - a) v and eps = sqrt(1 - a) x_t + sqrt(a) v, at alpha_bar 0 too."""
    ours = schedule("v_prediction").with_zero_terminal_snr()
    noisy = ours.add_noise(LATENTS, NOISE, TIMESTEPS)
    velocity = ours.target(LATENTS, NOISE, TIMESTEPS)
    signal, noise = ours.signal_and_noise_scale(TIMESTEPS)
    torch.testing.assert_close(signal * noisy - noise * velocity, LATENTS, rtol=0, atol=2e-6)
    torch.testing.assert_close(noise * noisy + signal * velocity, NOISE, rtol=0, atol=2e-6)
    assert torch.equal(noisy[-1], NOISE[-1])
    assert torch.equal(velocity[-1], -LATENTS[-1])


def test_zero_terminal_snr_is_the_schedulers_own_rescaling() -> None:
    rescaled = schedule().with_zero_terminal_snr().alphas_cumprod
    theirs = DDPMScheduler.from_config(SCHEDULER.config, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(rescaled, theirs, rtol=2e-4, atol=1e-7)  # theirs go through betas in fp32
    assert rescaled.dtype == torch.float32
    assert rescaled[-1] == 0
    assert (rescaled.diff() < 0).all()
    # by hand: sqrt(alpha_bar) = 0.9, 0.5, 0.1 -> (0.8, 0.4, 0) x 0.9 / 0.8
    by_hand = NoiseSchedule(alphas_cumprod=torch.tensor([0.81, 0.25, 0.01]), prediction_type="v_prediction")
    once = by_hand.with_zero_terminal_snr()
    assert once.alphas_cumprod.tolist() == pytest.approx([0.81, 0.2025, 0], abs=1e-7)
    assert once.prediction_type == "v_prediction"
    torch.testing.assert_close(once.with_zero_terminal_snr().alphas_cumprod, once.alphas_cumprod, rtol=1e-6, atol=0)


# SNR 9, 1, 1/9, 0 and infinity
SIGNAL_SHARES = torch.tensor([0.9, 0.5, 0.1, 0.0, 1.0])


@pytest.mark.parametrize(
    ("weighting", "gamma", "prediction_type", "expected"),
    [
        ("none", None, "epsilon", [1, 1, 1, 1, 1]),
        ("none", None, "v_prediction", [1, 1, 1, 1, 1]),
        ("snr", None, "epsilon", [1, 1, 1, 1, 1]),  # SNR / SNR
        ("snr", None, "v_prediction", [0.9, 0.5, 0.1, 0, 1]),  # SNR / (SNR + 1)
        ("min_snr", 5, "epsilon", [5 / 9, 1, 1, 1, 0]),  # min(1, 5 / SNR)
        ("min_snr", 0.5, "epsilon", [0.5 / 9, 0.5, 1, 1, 0]),
        ("min_snr", 5, "v_prediction", [0.5, 0.5, 0.1, 0, 0]),  # min(SNR, 5) / (SNR + 1): 5 / 10, 1 / 2, 1/9 / (10/9)
    ],
)
def test_error_weights_by_hand(
    weighting: str, gamma: float | None, prediction_type: str, expected: list[float]
) -> None:
    ours = NoiseSchedule(
        alphas_cumprod=SIGNAL_SHARES, prediction_type=prediction_type, error_weighting=weighting, snr_gamma=gamma
    )
    weight = ours.to("cpu").error_weight(torch.tensor([4, 3, 2, 1, 0]))
    assert weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx(expected[::-1], abs=1e-6)


@pytest.mark.parametrize("weighting", ["snr", "min_snr"])
def test_a_weight_counts_the_error_in_clean_latents_whatever_is_predicted(weighting: str) -> None:
    """Two models that err alike in x0 weigh alike, and as the paper's table says: SNR, or min(SNR, 5)."""
    timesteps = torch.tensor([50, 300, 700, 950])
    clean_error = randn(4, 4, 8, 8, seed=20)
    signal, noise = schedule().signal_and_noise_scale(timesteps)
    # x0 = (x_t - sqrt(1 - a) eps) / sqrt(a) = sqrt(a) x_t - sqrt(1 - a) v
    errors = {"epsilon": clean_error * signal / noise, "v_prediction": clean_error / noise}
    snr = (signal / noise).square().flatten()
    expected = {"snr": snr, "min_snr": snr.clamp(max=5)}[weighting] * clean_error.square().mean((1, 2, 3))
    for prediction_type, error in errors.items():
        ours = replace(schedule(prediction_type), error_weighting=weighting, snr_gamma=5)
        weighted = ours.error_weight(timesteps) * error.square().mean((1, 2, 3))
        torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=0)


def test_squared_error_is_each_images_mean_in_fp32() -> None:
    prediction = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]]).view(2, 1, 2, 2)
    error = squared_error(prediction, target)
    assert error.dtype == torch.float32
    assert error.tolist() == [7.5, 1.0]  # (1 + 4 + 9 + 16) / 4 and 4 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_predictions_differ_by_exactly_nothing(dtype: torch.dtype) -> None:
    prediction = randn(3, 4, 8, 8, seed=2).to(dtype)
    difference = paired_error_difference(prediction, prediction.clone(), randn(3, 4, 8, 8, seed=3))
    assert difference.dtype == torch.float32
    assert difference.tolist() == [0, 0, 0]


def plain_difference(policy: torch.Tensor, reference: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    policy, reference, target = policy.double(), reference.double(), target.double()
    return ((policy - target) ** 2).mean((1, 2, 3)) - ((reference - target) ** 2).mean((1, 2, 3))


def test_the_difference_is_policy_minus_reference_error() -> None:
    policy, reference, target = (randn(6, 4, 8, 8, seed=seed) for seed in (4, 5, 6))
    difference = paired_error_difference(policy, reference, target)
    torch.testing.assert_close(difference.double(), plain_difference(policy, reference, target), rtol=1e-5, atol=1e-6)
    # by hand: target 0, policy 1, reference 2 everywhere
    ones = torch.ones(1, 1, 2, 2)
    assert paired_error_difference(ones, 2 * ones, 0 * ones).tolist() == [-3.0]


@pytest.mark.parametrize(
    ("dtype", "moved_share", "factor"), [(torch.bfloat16, 0.01, 1.01), (torch.float32, 1, 1.00001)]
)
def test_early_in_training_the_difference_keeps_its_digits(
    dtype: torch.dtype, moved_share: float, factor: float
) -> None:
    """Predictions that differ little, as after the first updates: what plain subtractions would lose."""
    target = randn(64, 4, 32, 32, seed=7)
    reference = (target + 0.3 * randn(64, 4, 32, 32, seed=8)).to(dtype)
    moved = torch.rand(reference.shape, generator=torch.Generator().manual_seed(9)) < moved_share
    policy = torch.where(moved, reference * factor, reference)
    truth = plain_difference(policy, reference, target)
    ours = (paired_error_difference(policy, reference, target) - truth).abs().max()
    of_means = squared_error(policy, target) - squared_error(reference, target)
    assert ours < 0.1 * (of_means - truth).abs().max()
    if dtype == torch.float32:
        of_elements = ((policy - target) ** 2 - (reference - target) ** 2).mean((1, 2, 3))
        assert ours < 0.1 * (of_elements - truth).abs().max()
    else:
        rounded = target.to(dtype)
        in_bf16 = ((policy - rounded) ** 2).mean((1, 2, 3)) - ((reference - rounded) ** 2).mean((1, 2, 3))
        assert ours < 1e-4 * (in_bf16 - truth).abs().max()


def test_the_difference_has_the_gradient_of_the_policys_error() -> None:
    policy = randn(2, 4, 8, 8, seed=10).requires_grad_()
    reference, target = randn(2, 4, 8, 8, seed=11), randn(2, 4, 8, 8, seed=12)
    (paired,) = torch.autograd.grad(paired_error_difference(policy, reference, target).sum(), policy)
    torch.testing.assert_close(paired, 2 * (policy.detach() - target) / 256, rtol=1e-4, atol=1e-7)
