"""The straight line from images to noise, and what weights of its errors mean."""

import pytest
import torch

from ds_dpo.diffusion.flow import Flow
from ds_dpo.diffusion.shift import Shift, ShiftByTokens

FLOW = Flow()


def random_of(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_line_of_diffusers_scheduler() -> None:
    """Its sigmas at shift 1 are (t + 1) / T, from the noisiest on, and its scale_noise is ours."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler()
    timesteps = torch.arange(1000).flip(0)
    assert torch.allclose(FLOW.denoiser_time(timesteps), theirs.timesteps, rtol=1e-6, atol=0)
    assert torch.allclose(FLOW.sigmas(timesteps).float(), theirs.sigmas, rtol=1e-6, atol=0)
    latents, noise = random_of(3, 2, 2, 2, seed=0).float(), random_of(3, 2, 2, 2, seed=1).float()
    asked = torch.tensor([0, 499, 999])
    expected = theirs.scale_noise(latents, theirs.timesteps.flip(0)[asked], noise)
    assert torch.allclose(FLOW.add_noise(latents, noise, asked), expected, atol=1e-6, rtol=0)
    assert torch.equal(FLOW.add_noise(latents, noise, asked)[2], noise[2])  # s is exactly 1 at the last timestep


def test_a_step_along_the_target_leads_to_the_image() -> None:
    latents, noise, timesteps = random_of(2, 1, 2, 2, seed=0), random_of(2, 1, 2, 2, seed=1), torch.tensor([99, 799])
    noisy, sigma = FLOW.add_noise(latents, noise, timesteps), torch.tensor([0.1, 0.8]).double().view(-1, 1, 1, 1)
    target = FLOW.target(latents, noise, timesteps)
    assert torch.allclose(noisy - sigma * target, latents)
    assert torch.allclose(noisy + (1 - sigma) * target, noise)


@pytest.mark.parametrize("weighting", ["epsilon", "x0"])
def test_a_weighted_velocity_error_is_the_error_of_what_the_weight_is_named_after(weighting: str) -> None:
    """The predicted velocity implies clean latents and noise; their squared errors are computed from these."""
    latents, noise, timesteps = (
        random_of(3, 1, 2, 2, seed=0),
        random_of(3, 1, 2, 2, seed=1),
        torch.tensor([9, 499, 899]),
    )
    sigma = torch.tensor([0.01, 0.5, 0.9]).double().view(-1, 1, 1, 1)
    velocity, noisy = random_of(3, 1, 2, 2, seed=2), FLOW.add_noise(latents, noise, timesteps)
    implied = {"epsilon": (noisy + (1 - sigma) * velocity, noise), "x0": (noisy - sigma * velocity, latents)}
    predicted, true = implied[weighting]
    expected = (predicted - true).square().mean(dim=(1, 2, 3))
    error = (velocity - FLOW.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
    weights = Flow(error_weighting=weighting).error_weight(timesteps)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.double() * error, expected, rtol=1e-6)


def test_no_weighting_counts_every_velocity_error_alike() -> None:
    assert FLOW.error_weight(torch.tensor([0, 500, 999])).tolist() == [1, 1, 1]


def test_the_fingerprint_is_of_what_noises_an_image_and_not_of_what_weighs_its_error() -> None:
    assert Flow(error_weighting="x0").fingerprint() == FLOW.fingerprint()
    others = [
        Flow(num_train_timesteps=999),
        Flow(shift=Shift(factor=3)),
        Flow(shift=Shift(by_tokens=ShiftByTokens())),
        Flow(shift=Shift(by_tokens=ShiftByTokens(max_shift=0.9))),
    ]
    assert len({each.fingerprint() for each in [FLOW, *others]}) == 5
