"""Which sampler draws a model: over its noise schedule, or over its flow."""

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowEuler

from ds_dpo.errors import ModelError
from ds_dpo.models.sampler import dpmpp_from, euler_from, sampler_from

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear").config
# live settings, saved ones, and Sana's
FLOWS = [
    FlowEuler(shift=3.0).config,
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "prediction_type": "flow"},
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0).config,
]


def test_a_noise_schedule_is_drawn_by_the_sampler_that_is_asked_for() -> None:
    samplers = [make(SCHEDULE) for make in (sampler_from, euler_from, dpmpp_from)]
    assert [type(sampler) for sampler in samplers] == [
        *(DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)
    ]


@pytest.mark.parametrize("config", FLOWS, ids=["live", "saved", "of DPM-Solver"])
def test_a_flow_is_drawn_by_its_own_euler_at_its_own_times(config: dict[str, object]) -> None:
    for make in (sampler_from, euler_from):
        sampler = make(config)
        assert type(sampler) is FlowEuler
        sampler.set_timesteps(sigmas=[1.0, 0.5])
        assert sampler.timesteps.tolist() == [1000, 750]
    with pytest.raises(ModelError, match="sampler dpmpp does not take a flow model's times; take model, ddim or euler"):
        dpmpp_from(config)
