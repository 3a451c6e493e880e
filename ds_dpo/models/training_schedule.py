"""The forward process of a run: the model's own, with the changes of the configuration."""

from __future__ import annotations

from dataclasses import replace

from diffusers import DDIMScheduler

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.models import ModelConfig
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.errors import ConfigError
from ds_dpo.models.loading import drawing_scheduler, read_noise_schedule
from ds_dpo.models.sampler import ddim_from


def training_schedule(model: ModelConfig, diffusion: DiffusionConfig) -> NoiseSchedule:
    """Return a run's noise schedule and its weighting of errors. Raises ModelError as read_noise_schedule does."""
    schedule = read_noise_schedule(model)
    if diffusion.zero_terminal_snr:
        schedule = schedule.with_zero_terminal_snr()
    return replace(schedule, error_weighting=diffusion.error_weighting, snr_gamma=diffusion.snr_gamma)


def training_sampler(model: ModelConfig, diffusion: DiffusionConfig) -> DDIMScheduler:
    """Return a DDIM sampler over the schedule that the model is trained with.

    Raises ConfigError if a model that predicts epsilon would have to begin at a timestep without signal.
    """
    sampler = drawing_scheduler(model)
    if diffusion.zero_terminal_snr:
        sampler = ddim_from({**sampler.config, "rescale_betas_zero_snr": True})
    if sampler.config["prediction_type"] == "epsilon" and sampler.alphas_cumprod[-1] == 0:
        raise ConfigError(
            "images are drawn from the last timestep on, where zero terminal SNR leaves no signal, so that a predicted "
            "noise gives no clean latents; set model.prediction_type to v_prediction with a model made for it, or "
            "cadence.sample_every_steps to none"
        )
    return sampler
