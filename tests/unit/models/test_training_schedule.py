"""The forward process of a run: the model's own, and what the configuration changes of it."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.models import ModelConfig
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.errors import ConfigError
from ds_dpo.models.loading import drawing_scheduler, read_noise_schedule
from ds_dpo.models.training_schedule import training_sampler, training_schedule

ZERO_SNR = DiffusionConfig(zero_terminal_snr=True)


def predicts_velocity(model: ModelConfig, **changed: object) -> ModelConfig:
    folder = Path(model.pretrained, "scheduler")
    DDPMScheduler.from_pretrained(folder, prediction_type="v_prediction", **changed).save_pretrained(folder)
    return model


def noise_schedule(model: ModelConfig, diffusion: DiffusionConfig) -> NoiseSchedule:
    found = training_schedule(model, diffusion)
    assert isinstance(found, NoiseSchedule)
    return found


def test_without_the_section_it_is_the_models_own(sdxl: ModelConfig) -> None:
    own, trained = read_noise_schedule(sdxl), noise_schedule(sdxl, DiffusionConfig())
    assert torch.equal(trained.alphas_cumprod, own.alphas_cumprod)
    assert (trained.prediction_type, trained.error_weighting) == ("epsilon", "none")
    assert torch.equal(training_sampler(sdxl, DiffusionConfig()).alphas_cumprod, own.alphas_cumprod)


def test_weights_of_errors_come_from_the_configuration(sdxl: ModelConfig) -> None:
    trained = noise_schedule(sdxl, DiffusionConfig(error_weighting="min_snr", snr_gamma=5))
    share = trained.alphas_cumprod[10]
    expected = min(1, 5 * (1 - share.item()) / share.item())
    assert trained.error_weight(torch.tensor([10, 999])).tolist() == pytest.approx([expected, 1], rel=1e-4)


def test_zero_terminal_snr_is_the_options_or_the_models_own_and_images_are_drawn_by_it(sdxl_copy: ModelConfig) -> None:
    by_option = noise_schedule(predicts_velocity(sdxl_copy), ZERO_SNR)
    drawn = training_sampler(sdxl_copy, ZERO_SNR)
    predicts_velocity(sdxl_copy, rescale_betas_zero_snr=True)
    by_model, by_both = (noise_schedule(sdxl_copy, diffusion) for diffusion in (DiffusionConfig(), ZERO_SNR))
    for found in (by_option, by_model, by_both):
        assert found.prediction_type == "v_prediction"
        assert found.alphas_cumprod[-1] == 0
        torch.testing.assert_close(found.alphas_cumprod, by_option.alphas_cumprod, rtol=2e-4, atol=1e-7)
        torch.testing.assert_close(found.alphas_cumprod, drawn.alphas_cumprod, rtol=2e-4, atol=1e-7)
    drawn.set_timesteps(4)
    assert drawn.timesteps[0] == 999
    noise = torch.ones(1, 4, 2, 2)
    step = drawn.step(torch.full_like(noise, -0.5), drawn.timesteps[0], noise)
    assert torch.equal(step.pred_original_sample, torch.full_like(noise, 0.5)), "x0 = -v where there is no signal"
    assert torch.equal(
        training_sampler(sdxl_copy, DiffusionConfig()).alphas_cumprod, drawing_scheduler(sdxl_copy).alphas_cumprod
    )


def test_images_of_epsilon_prediction_cannot_begin_without_signal(sdxl: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"v_prediction .* or cadence\.sample_every_steps to none"):
        training_sampler(sdxl, ZERO_SNR)
