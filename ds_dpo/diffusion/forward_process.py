"""What a step asks of a forward process: a noise schedule, or a flow."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from ds_dpo.diffusion.shift import Shift


class ForwardProcess(Protocol):
    """How images become noise, and what a denoiser learns from that. N images; latents are (N, C, H, W) fp32.

    A timestep is an index from 0 (the least noise) to num_train_timesteps - 1 (the most), whatever the process.
    """

    @property
    def num_train_timesteps(self) -> int:
        """The number of timesteps."""
        ...

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: epsilon, v_prediction or flow."""
        ...

    @property
    def shift(self) -> Shift:
        """How drawn times are moved by the resolution of an image; NO_SHIFT for a noise schedule."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the process with its tensors on a device."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents, (N, C, H, W) fp32. timesteps: (N,) int64."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, (N, C, H, W) fp32."""
        ...

    def denoiser_time(self, timesteps: Tensor) -> Tensor:
        """Return what the denoiser takes as its time, (N,): what the model was trained with."""
        ...

    def error_weight(self, timesteps: Tensor) -> Tensor:
        """Return the factor of an image's squared error, (N,) fp32, finite and not below 0."""
        ...

    def holds_signal(self, timestep: int) -> bool:
        """Return whether a prediction at this timestep teaches something about images."""
        ...

    def fingerprint(self) -> str:
        """Return the SHA-256 of what noises an image, and of how its times are moved, as 64 hex digits.

        The weights of errors have no part in it.
        """
        ...
