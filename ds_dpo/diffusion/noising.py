"""What a run adds to its latents: from the configuration's section and the model's schedule, checked against it."""

from __future__ import annotations

from dataclasses import dataclass

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.diffusion.timesteps import TimestepDistribution, timestep_distribution
from ds_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Noising:
    """How timestep and noise of a pair are drawn.

    noise_offset: strength of a normal draw for each channel, added to the noise. input_perturbation: strength of a
    normal draw for each element, added to the noise that the UNet is shown, not to the one it should predict.
    """

    timesteps: TimestepDistribution
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    @classmethod
    def plain(cls, num_train_timesteps: int) -> Noising:
        """Any timestep alike, and nothing but normal noise: what a run without the section has."""
        return cls(timesteps=TimestepDistribution(values=range(num_train_timesteps)))


def noising_of(diffusion: DiffusionConfig, schedule: NoiseSchedule) -> Noising:
    """Return how a run noises its pairs. schedule: the one it trains on, of any device.

    Raises ConfigError where a timestep cannot be drawn or, for epsilon prediction, holds no signal.
    """
    timesteps = timestep_distribution(diffusion, num_train_timesteps=schedule.num_train_timesteps)
    _require_signal(schedule, timesteps.values[-1])
    return Noising(
        timesteps=timesteps, noise_offset=diffusion.noise_offset, input_perturbation=diffusion.input_perturbation
    )


def _require_signal(schedule: NoiseSchedule, noisiest: int) -> None:
    """Refuse epsilon at alpha_bar 0, where the noisy latent is the target: copying it is right, whatever the image.

    Source: arXiv:2305.08891, section 3.2.
    """
    if schedule.prediction_type == "epsilon" and schedule.alphas_cumprod[noisiest] == 0:
        raise ConfigError(
            f"timestep {noisiest} of this schedule (zero terminal SNR) is noise alone, so that predicting it (epsilon) "
            f"teaches nothing of images; take model.prediction_type v_prediction with a model made for it, or "
            f"diffusion.max_timestep {noisiest - 1}"
        )
