"""What noise a run adds to its latents, and at which timesteps, checked against the model's schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.diffusion.flow import FLOW_WEIGHTS, Flow
from ds_dpo.diffusion.forward_process import ForwardProcess
from ds_dpo.diffusion.timesteps import TimestepDistribution, TimestepsBySize, timestep_distribution
from ds_dpo.errors import ConfigError

SHARES = 1000  # quantiles of which the mean weight is taken


@dataclass(frozen=True, kw_only=True)
class Noising:
    """How the timestep and noise of a pair are drawn.

    noise_offset: scale of a normal draw for each channel, which is added to the noise. input_perturbation: scale of a
    normal draw for each element, which is added to the noise in the denoiser's input, but not to its target.
    """

    timesteps: TimestepDistribution | TimestepsBySize
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    @classmethod
    def plain(cls, num_train_timesteps: int) -> Noising:
        """Return uniform timesteps and plain normal noise, as in a run whose diffusion section is empty."""
        return cls(timesteps=TimestepDistribution(values=range(num_train_timesteps)))


def noising_of(diffusion: DiffusionConfig, schedule: ForwardProcess) -> Noising:
    """Return how a run adds noise to its pairs. schedule: the one that it trains on, on any device.

    Raises ConfigError if a timestep cannot be drawn or, for epsilon prediction, holds no signal.
    """
    timesteps = _timesteps(diffusion, schedule)
    _require_signal(schedule, timesteps.values[-1])
    return Noising(
        timesteps=timesteps, noise_offset=diffusion.noise_offset, input_perturbation=diffusion.input_perturbation
    )


def describe_times(
    noising: Noising, process: ForwardProcess, *, latent_shape: tuple[int, int, int], what: str
) -> list[str]:
    """Return lines on the times that a flow model draws, and on what its errors weigh; none for a noise schedule.

    latent_shape: C, H, W of the images that the lines speak of. what: the images in words.
    """
    if not isinstance(process, Flow):
        return []
    timesteps, number = noising.timesteps.at(latent_shape), process.num_train_timesteps
    drawn = torch.tensor([timesteps.quantile((place + 0.5) / SHARES) for place in range(SHARES)])
    low, middle, high = ((timesteps.quantile(share) + 1) / number for share in (0.25, 0.5, 0.75))
    factor = process.shift.factor_at(latent_shape)
    direction = "not shifted" if factor == 1 else f"shifted {'towards noise' if factor > 1 else 'towards clean images'}"
    weight = {
        name: f"{replace(process, error_weighting=name).error_weight(drawn).mean().item():.3g}" for name in FLOW_WEIGHTS
    }
    own = process.error_weighting
    others = " and ".join(f"{name} {number}" for name, number in weight.items() if name != own)
    return [
        f"flow: times are {direction} (factor {factor:.3g}): for {what} the share of noise s has the quartiles "
        f"{low:.3f}, {middle:.3f} and {high:.3f}",
        f"flow: over these times the mean weight of an error, and so of beta, is {own} {weight[own]}; it would be "
        f"{others}",
    ]


def _timesteps(diffusion: DiffusionConfig, schedule: ForwardProcess) -> TimestepDistribution | TimestepsBySize:
    shift, number = schedule.shift, schedule.num_train_timesteps
    if shift.by_tokens is None:
        return timestep_distribution(diffusion, num_train_timesteps=number, shift_factor=shift.factor)
    for tokens in (shift.by_tokens.base_tokens, shift.by_tokens.max_tokens):  # refuses now what they would refuse later
        timestep_distribution(diffusion, num_train_timesteps=number, shift_factor=shift.by_tokens.factor(tokens))
    return TimestepsBySize(diffusion=diffusion, num_train_timesteps=number, shift=shift)


def _require_signal(schedule: ForwardProcess, noisiest: int) -> None:
    """Refuse a noisiest timestep at which copying the noisy latent is right for any image."""
    if not schedule.holds_signal(noisiest):
        raise ConfigError(
            f"timestep {noisiest} of this schedule (zero terminal SNR) is pure noise, so predicting it (epsilon) "
            f"teaches nothing about images; set model.prediction_type v_prediction with a model made for it, or "
            f"diffusion.max_timestep {noisiest - 1}"
        )
