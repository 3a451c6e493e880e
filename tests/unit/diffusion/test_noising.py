"""What a run adds to its latents, settled between its configuration and the model's schedule."""

import pytest
import torch

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.diffusion.flow import Flow
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.diffusion.noising import Noising, describe_times, noising_of
from ds_dpo.diffusion.shift import NO_SHIFT, Shift
from ds_dpo.errors import ConfigError


def schedule(prediction_type, *, last=0.0):
    return NoiseSchedule(alphas_cumprod=torch.tensor([0.9, 0.5, 0.1, last]), prediction_type=prediction_type)


def test_without_the_section_noising_is_plain():
    assert noising_of(DiffusionConfig(), schedule("epsilon", last=0.01)) == Noising.plain(4)


def test_strengths_and_timesteps_are_those_of_the_configuration():
    diffusion = DiffusionConfig(noise_offset=0.05, input_perturbation=0.1, min_timestep=1, max_timestep=2)
    noising = noising_of(diffusion, schedule("epsilon"))
    assert (noising.noise_offset, noising.input_perturbation) == (0.05, 0.1)
    assert list(noising.timesteps.values) == [1, 2]


def test_epsilon_is_refused_where_a_timestep_without_signal_is_drawn():
    with pytest.raises(ConfigError, match=r"timestep 3 .*model\.prediction_type v_prediction .*max_timestep 2"):
        noising_of(DiffusionConfig(), schedule("epsilon"))
    assert list(noising_of(DiffusionConfig(max_timestep=2), schedule("epsilon")).timesteps.values) == [0, 1, 2]
    assert list(noising_of(DiffusionConfig(), schedule("v_prediction")).timesteps.values) == [0, 1, 2, 3]


def test_the_times_and_weights_of_a_flow_are_said_in_numbers():
    """With uniform times the mean of (1 - s)^2 is 1/3, and so is that of s^2; with shift 3 they are integrals.

    (1 - s)^2 = ((1 - u) / (1 + 2 u))^2 has the integral 1 - (3/4) ln 3 = 0.176; s^2 = (3 u / (1 + 2 u))^2 has
    3 - (9/4) ln 3 = 0.528. A timestep has the largest s of its thousandth, which adds up to 0.001.
    """
    at_512 = {"latent_shape": (16, 64, 64), "what": "512 x 512 pixels"}
    for shift, factor, quartiles, weights in (
        (NO_SHIFT, "not shifted (factor 1)", "0.251, 0.501 and 0.751", "0.333 and x0 0.334"),
        (Shift(factor=3), "shifted towards noise (factor 3)", "0.501, 0.751 and 0.901", "0.176 and x0 0.529"),
        (Shift(factor=1 / 3), "shifted towards clean images (factor 0.333)", "0.101, 0.251 and 0.501", "0.527 and x0"),
    ):
        flow = Flow(shift=shift)
        times, weighed = describe_times(noising_of(DiffusionConfig(), flow), flow, **at_512)
        assert times == (
            f"flow: times are {factor}: for 512 x 512 pixels the share of noise s has the quartiles {quartiles}"
        )
        assert f"is none 1; it would be epsilon {weights}" in weighed
    plain = schedule("v_prediction")
    assert describe_times(noising_of(DiffusionConfig(), plain), plain, **at_512) == []
