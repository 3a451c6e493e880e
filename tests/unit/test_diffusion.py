"""Noise, targets and errors against diffusers' scheduler and against plain formulas in float64."""

import pytest
import torch
from diffusers import DDPMScheduler

from ds_dpo.diffusion import TARGETS, NoiseSchedule, paired_error_difference, squared_error

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
