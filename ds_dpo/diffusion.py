"""Diffusion as pure functions: adding noise, what a prediction is compared with, and squared errors.

Legend: N images; C,H,W latent; T training timesteps. Predictions come in the model's dtype; every error
is computed and returned in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The forward process of a model, as its scheduler config states it.

    alphas_cumprod: (T,) fp32, the share of signal variance left at each timestep. prediction_type: what the
    UNet predicts, a key of TARGETS.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(alphas_cumprod=self.alphas_cumprod.to(device), prediction_type=self.prediction_type)

    def signal_and_noise_scale(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) as (N, 1, 1, 1) for timesteps (N,)."""
        signal_share = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return signal_share.sqrt(), (1 - signal_share).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, (N, C, H, W) fp32.

        latents, noise: (N, C, H, W) fp32. timesteps: (N,) int64. Source: arXiv:2006.11239, eq. 4.
        """
        signal_scale, noise_scale = self.signal_and_noise_scale(timesteps)
        return signal_scale * latents + noise_scale * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the UNet should predict, (N, C, H, W) fp32, by the model's prediction type."""
        return TARGETS[self.prediction_type](self, latents, noise, timesteps)


def _epsilon_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return noise


def _velocity_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0. Source: arXiv:2202.00512, appendix D."""
    signal_scale, noise_scale = schedule.signal_and_noise_scale(timesteps)
    return signal_scale * noise - noise_scale * latents


TARGETS: dict[str, Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": _epsilon_target,
    "v_prediction": _velocity_target,
}


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return each image's squared error, the mean over C,H,W: (N, C, H, W) twice -> (N,) fp32."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def paired_error_difference(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Return each image's policy error minus reference error, (N,) fp32, exactly 0 where both predict alike.

    policy, reference, target: (N, C, H, W). mean((p - q)(p + q - 2t)) equals mean((p - t)^2) - mean((q - t)^2)
    without subtracting two near-equal means, whose rounding is as large as the signal early in training.
    """
    p, q, t = policy.float(), reference.float(), target.float()
    return ((p - q) * (p + q - 2 * t)).mean(dim=(1, 2, 3))
