"""What a run adds to its latents, settled between its configuration and the model's schedule."""

import pytest
import torch

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.diffusion.noising import Noising, noising_of
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
