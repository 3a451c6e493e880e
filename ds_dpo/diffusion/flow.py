"""The forward process of a rectified flow: images and noise on a straight line.

Legend: N images; C,H,W latent; T timesteps; x0 clean latents, e noise, s (sigma) the share of noise, from 0 (clean) to
1 (noise). Timestep t, 0 .. T - 1, has s = (t + 1) / T. Source: arXiv:2403.03206, section 2 and 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_dpo.diffusion.shift import NO_SHIFT, Shift


@dataclass(frozen=True, kw_only=True)
class Flow:
    """x_t = (1 - s) x0 + s e, from which the denoiser predicts the velocity v = e - x0.

    error_weighting: a key of FLOW_WEIGHTS. shift: how the times that are drawn for training are moved.
    """

    num_train_timesteps: int = 1000
    error_weighting: str = "none"
    shift: Shift = NO_SHIFT

    @property
    def prediction_type(self) -> str:
        """The name of what a flow predicts, for logs and fingerprints."""
        return "flow"

    def to(self, device: torch.device | str) -> Flow:
        """Return itself: a flow has no tensors."""
        return self

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Return s = (t + 1) / T of timesteps (N,) int64, (N,) fp64."""
        return (timesteps.double() + 1) / self.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = (1 - s) x0 + s e, (N, C, H, W). latents, noise: (N, C, H, W). timesteps: (N,) int64."""
        sigma = self.sigmas(timesteps).view(-1, 1, 1, 1)
        return (1 - sigma).to(latents.dtype) * latents + sigma.to(latents.dtype) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity v = e - x0, (N, C, H, W), which is the same at each timestep."""
        return noise - latents

    def denoiser_time(self, timesteps: Tensor) -> Tensor:
        """Return T s = t + 1 as (N,) fp32: diffusers' transformers take T sigma."""
        return timesteps.float() + 1

    def error_weight(self, timesteps: Tensor) -> Tensor:
        """Return the factor of an image's squared velocity error, (N,) fp32, at least 0.

        A velocity u that is predicted at x_t implies clean latents x_t - s u and noise x_t + (1 - s) u. With u = v both
        are exact. So the error of the clean latents is s^2 times that of the velocity, and the error of the noise is
        (1 - s)^2 times it. none: 1, the velocity's error counts alike at each s, as in every published code of flow
        DPO. epsilon: (1 - s)^2, the noise's error counts alike, as in Diffusion-DPO. x0: s^2, the clean latents' does.
        """
        return FLOW_WEIGHTS[self.error_weighting](self.sigmas(timesteps)).float()

    def holds_signal(self, timestep: int) -> bool:
        """Return True: at s = 1 the target e - x0 still depends on the image."""
        return True

    def fingerprint(self) -> str:
        """Return the SHA-256 of T and of the shift, as 64 hex digits."""
        return hashlib.sha256(f"flow {self.num_train_timesteps} {self.shift}".encode()).hexdigest()


FLOW_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "epsilon": lambda sigma: (1 - sigma).square(),
    "x0": torch.square,
}
