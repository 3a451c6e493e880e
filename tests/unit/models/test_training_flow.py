"""The forward process of a flow model's run: its scheduler's own, and what the configuration changes of it."""

import json
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.models import ModelConfig
from ds_dpo.diffusion.flow import Flow
from ds_dpo.diffusion.shift import NO_SHIFT, Shift, ShiftByTokens
from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.models.training_schedule import training_sampler, training_schedule

DYNAMIC = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192}
BY_TOKENS = Shift(by_tokens=ShiftByTokens(max_shift=0.9, max_tokens=8192))


def flow_model(model: ModelConfig, **settings: object) -> ModelConfig:
    """The model with a flow's scheduler; no other part of a model is read for its forward process."""
    folder = Path(model.pretrained, "scheduler")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder)
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    return model


@pytest.mark.parametrize(
    ("scheduler", "options", "shift"),
    [
        ({}, {}, NO_SHIFT),
        ({"shift": 3.0}, {}, Shift(factor=3)),
        (DYNAMIC, {}, BY_TOKENS),
        ({"shift": 3.0}, {"timestep_shift": "none"}, NO_SHIFT),
        (DYNAMIC, {"timestep_shift": "static", "shift": 5}, Shift(factor=5)),
        ({"shift": 3.0}, {"timestep_shift": "by_resolution"}, Shift(by_tokens=ShiftByTokens())),
    ],
)
def test_the_shift_is_the_models_own_unless_the_configuration_has_one(
    sdxl_copy: ModelConfig, scheduler: dict[str, object], options: dict[str, object], shift: Shift
) -> None:
    model = flow_model(sdxl_copy, **scheduler)
    for asked in (model, model.model_copy(update={"prediction_type": "flow"})):
        found = training_schedule(asked, DiffusionConfig.model_validate({"error_weighting": "x0", **options}))
        assert found == Flow(error_weighting="x0", shift=shift)


def test_images_of_a_flow_are_drawn_at_its_schedulers_times(sdxl_copy: ModelConfig) -> None:
    sampler = training_sampler(flow_model(sdxl_copy, shift=3.0), DiffusionConfig())
    assert isinstance(sampler, FlowMatchEulerDiscreteScheduler)
    sampler.set_timesteps(sigmas=[1.0, 0.5])
    assert sampler.timesteps.tolist() == [1000, 750]


def test_a_flow_that_another_sampler_serves_is_one_too(sdxl_copy: ModelConfig) -> None:
    """As Sana's, whose scheduler is DPM-Solver over a flow with shift 3."""
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    DPMSolverMultistepScheduler(**settings).save_pretrained(Path(sdxl_copy.pretrained, "scheduler"))
    assert training_schedule(sdxl_copy, DiffusionConfig()) == Flow(shift=Shift(factor=3))
    sampler = training_sampler(sdxl_copy, DiffusionConfig())
    sampler.set_timesteps(sigmas=[1.0, 0.5])
    assert sampler.timesteps.tolist() == [1000, 750]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_sampling": "turbo"}, "timestep_sampling turbo, but .* is a flow model"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr true, but .* is a flow model: a flow ends in pure noise"),
        ({"noise_offset": 0.1}, "noise_offset 0.1, but .* is a flow model"),
        ({"error_weighting": "snr"}, "error_weighting snr, but .* is a flow model: .* none, epsilon, x0 would fit"),
        ({"error_weighting": "min_snr", "snr_gamma": 5}, "error_weighting min_snr, but .* none, epsilon, x0 would fit"),
    ],
)
def test_what_belongs_to_a_noise_schedule_is_refused_for_a_flow(
    sdxl_copy: ModelConfig, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"diffusion\.{message}"):
        training_schedule(flow_model(sdxl_copy), DiffusionConfig.model_validate(options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_sampling": "mode", "mode_scale": 1.29}, "timestep_sampling mode, but .* has a noise schedule"),
        ({"timestep_shift": "none"}, "timestep_shift none, but .* has a noise schedule"),
        ({"timestep_shift": "static", "shift": 3}, "timestep_shift static, but .* has a noise schedule"),
        ({"error_weighting": "x0"}, "error_weighting x0, but .* has a noise schedule: .* none, snr, min_snr would fit"),
    ],
)
def test_what_belongs_to_a_flow_is_refused_for_a_noise_schedule(
    sdxl: ModelConfig, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"diffusion\.{message}"):
        training_schedule(sdxl, DiffusionConfig.model_validate(options))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": -1.0}, "shift -1.0; it must be above 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0; it must be"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"use_dynamic_shifting": True, "base_shift": None}, "base_shift None; a number would fit"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "base_shift 0.5 at 4096 tokens and max_shift"),
        ({"use_dynamic_shifting": True, "max_shift": 1e9}, "give no shift"),
    ],
)
def test_a_scheduler_that_gives_no_flow_is_refused(
    sdxl_copy: ModelConfig, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        training_schedule(flow_model(sdxl_copy, **settings), DiffusionConfig())


def test_a_model_keeps_the_process_that_it_was_trained_with(sdxl_copy: ModelConfig) -> None:
    asked = sdxl_copy.model_copy(update={"prediction_type": "flow"})
    with pytest.raises(ModelError, match=r"prediction_type flow: the scheduler config of .* is of a noise schedule"):
        training_schedule(asked, DiffusionConfig())
    asked = flow_model(sdxl_copy).model_copy(update={"prediction_type": "epsilon"})
    with pytest.raises(ModelError, match=r"prediction_type epsilon: the scheduler config of .* is of a flow"):
        training_schedule(asked, DiffusionConfig())
