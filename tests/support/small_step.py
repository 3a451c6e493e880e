"""A UNet of one factor per element, random pairs, and steps on them: small enough to work everything out on tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning, PreferenceBatch
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.objectives.losses import Objective
from ds_dpo.objectives.statistics import Statistic
from ds_dpo.step.preference_step import PreferenceStep

SCHEDULE = NoiseSchedule(alphas_cumprod=torch.linspace(0.95, 0.05, 10), prediction_type="epsilon")
SHAPE = (4, 3, 5)


class ElementwiseUNet(nn.Module):
    """Multiplies the noisy latents by one weight for each element; its prediction is in a dtype of choice."""

    def __init__(self, seed: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.5 + 0.5 * torch.rand(SHAPE, generator=generator))
        self.dtype_of_prediction = dtype

    def forward(self, sample: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        return ((self.weight * sample).to(self.dtype_of_prediction),)


class Frozen:
    def __init__(self, unet: nn.Module) -> None:
        self.module = unet

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return predict_by_unet(self.module, noisy_latents, timesteps, conditioning)


def random_pairs(number: int, *, seed: int = 0) -> PreferenceBatch:
    generator = torch.Generator().manual_seed(seed)
    return PreferenceBatch(
        latents=torch.randn(2 * number, *SHAPE, generator=generator),
        noise=torch.randn(number, *SHAPE, generator=generator),
        timesteps=torch.randint(10, (number,), generator=generator),
        text_states=torch.zeros(number, 1, 1),
        pooled=None,
        pair_ids=torch.arange(number),
        target_probabilities=torch.ones(number),
        weights=torch.ones(number),
    )


def only(batch: PreferenceBatch, pairs: slice) -> PreferenceBatch:
    """Some pairs of a batch, as a smaller micro-batch has them."""
    chosen, rejected = batch.latents.chunk(2)
    return PreferenceBatch(
        latents=torch.cat([chosen[pairs], rejected[pairs]]),
        noise=batch.noise[pairs],
        timesteps=batch.timesteps[pairs],
        text_states=batch.text_states[pairs],
        pooled=None,
        pair_ids=batch.pair_ids[pairs],
        target_probabilities=batch.target_probabilities[pairs],
        weights=batch.weights[pairs],
    )


def step_of(
    objective: Objective,
    options: Mapping[str, Any],
    *,
    policy: nn.Module,
    reference: nn.Module | None,
    statistic: Statistic | None = None,
) -> PreferenceStep:
    return PreferenceStep(
        policy=policy,
        predict=predict_by_unet,
        reference=None if reference is None else Frozen(reference),
        schedule=SCHEDULE,
        objective=objective,
        options=options,
        statistic=statistic,
    )
