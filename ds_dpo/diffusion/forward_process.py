"""What a step asks of a forward process: a noise schedule, or a flow."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ForwardProcess(Protocol):
    """How images become noise, and what a denoiser learns from that. N images; latents are (N, C, H, W) fp32."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents, (N, C, H, W) fp32. timesteps: (N,) int64."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, (N, C, H, W) fp32."""
        ...

    def error_weight(self, timesteps: Tensor) -> Tensor:
        """Return the factor of an image's squared error, (N,) fp32, finite and not below 0."""
        ...
