"""Diffusion as pure functions: adding noise, the target of a prediction, and squared errors.

Legend: N images; C,H,W latent; T training timesteps. Predictions have the model's dtype; errors are computed and
returned in fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_dpo.diffusion.shift import NO_SHIFT, Shift


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The forward process of a model, as its scheduler config states it.

    alphas_cumprod: (T,) fp32, the share of signal variance left at each timestep. prediction_type: what the
    denoiser predicts, a key of TARGETS. error_weighting: how errors count by timestep, none or a key of ERROR_WEIGHTS.
    snr_gamma: min_snr's cap.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    error_weighting: str = "none"
    snr_gamma: float | None = None

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def shift(self) -> Shift:
        return NO_SHIFT

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule, rescaled so that its last timestep is pure noise and its first is unchanged.

        sqrt(alpha_bar_t) is shifted by its last value, then scaled; a schedule that ends in 0 does not change.
        Source: arXiv:2305.08891, algorithm 1.
        """
        signal_scale = self.alphas_cumprod.double().sqrt()
        first, last = signal_scale[0], signal_scale[-1]
        rescaled = (signal_scale - last) * (first / (first - last))
        return replace(self, alphas_cumprod=rescaled.square().float())

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
        """Return what the denoiser should predict, (N, C, H, W) fp32, by the model's prediction type."""
        return TARGETS[self.prediction_type](self, latents, noise, timesteps)

    def denoiser_time(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps themselves, (N,) int64: a model of noise prediction takes the index."""
        return timesteps

    def holds_signal(self, timestep: int) -> bool:
        """Return False for epsilon at alpha_bar 0: the noisy latent is the target there, whatever the image.

        Source: arXiv:2305.08891, section 3.2.
        """
        return self.prediction_type != "epsilon" or bool(self.alphas_cumprod[timestep] > 0)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the signal levels, as 64 hex digits."""
        return hashlib.sha256(self.alphas_cumprod.cpu().numpy().tobytes()).hexdigest()

    def error_weight(self, timesteps: Tensor) -> Tensor:
        """Return the factor of an image's squared error at each timestep, (N,) fp32, finite and at least 0.

        error_weighting defines a weight for the error in the clean latents: SNR for snr, min(SNR, gamma) for min_snr,
        with SNR = alpha_bar / (1 - alpha_bar). The error of a prediction times 1/SNR (epsilon) or 1/(SNR + 1) (v) is
        the error in the clean latents. So min_snr is min(1, gamma/SNR) for epsilon, and min(SNR, gamma)/(SNR + 1) for
        v. For none the factor is 1.
        Source: arXiv:2303.09556, section 3.
        """
        if self.error_weighting == "none":
            return torch.ones_like(timesteps, dtype=torch.float32)
        signal_share = self.alphas_cumprod[timesteps].double().clamp(min=SMALLEST_SIGNAL_SHARE)
        clean_error_weight = ERROR_WEIGHTS[self.error_weighting](signal_share, self.snr_gamma)
        return (clean_error_weight / CLEAN_ERROR_DIVISORS[self.prediction_type](signal_share)).float()


def _epsilon_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return noise


def _velocity_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0. Source: arXiv:2202.00512, appendix D."""
    signal_scale, noise_scale = schedule.signal_and_noise_scale(timesteps)
    return signal_scale * noise - noise_scale * latents


def _capped_signal_share(signal_share: Tensor, snr_gamma: float | None) -> Tensor:
    assert snr_gamma is not None
    return torch.minimum(signal_share, snr_gamma * (1 - signal_share))


TARGETS: dict[str, Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": _epsilon_target,
    "v_prediction": _velocity_target,
}

# Both tables leave out a common factor of 1 / (1 - alpha_bar), which may be infinite. The weight of the clean latents'
# error is min(SNR, gamma) = min(alpha_bar, gamma (1 - alpha_bar)) / (1 - alpha_bar), ...
ERROR_WEIGHTS: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    "snr": lambda signal_share, _: signal_share,
    "min_snr": _capped_signal_share,
}
# ... and that error is the prediction's, divided by SNR = alpha_bar / (1 - alpha_bar) or SNR + 1 = 1 / (1 - alpha_bar).
CLEAN_ERROR_DIVISORS: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda signal_share: signal_share,
    "v_prediction": torch.ones_like,
}
SMALLEST_SIGNAL_SHARE = 1e-60  # instead of 0: a quotient takes its limit, and a product is 0 in fp32


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return each image's squared error, the mean over C,H,W: (N, C, H, W) twice -> (N,) fp32 (fp64 of fp64)."""
    return (at_least_fp32(prediction) - at_least_fp32(target)).square().mean(dim=(1, 2, 3))


def paired_error_difference(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Return each image's policy error minus reference error, (N,) fp32; exactly 0 if both predict the same.

    policy, reference, target: (N, C, H, W). mean((p - q)(p + q - 2t)) equals mean((p - t)^2) - mean((q - t)^2), but
    does not subtract two nearly equal means, whose rounding is as large as the signal early in training.
    """
    p, q, t = at_least_fp32(policy), at_least_fp32(reference), at_least_fp32(target)
    return ((p - q) * (p + q - 2 * t)).mean(dim=(1, 2, 3))


def at_least_fp32(values: Tensor) -> Tensor:
    """Return fp32 of any smaller type, and fp64 as it is, so that a check in fp64 goes through the same code."""
    return values if values.dtype == torch.float64 else values.float()
