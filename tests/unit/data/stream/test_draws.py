"""Every draw belongs to the pair: a function of seed, pair id and visit, and each draw independent of the others."""

import hashlib
import struct
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.data.stream.draws import draw_pair
from ds_dpo.diffusion.noising import Noising
from ds_dpo.diffusion.timesteps import timestep_distribution


def draw(*, seed=0, pair_id=1, visit=0, latent_shape=(4, 2, 2), num_train_timesteps=1000, **options):
    return draw_pair(
        seed=seed,
        pair_id=pair_id,
        visit=visit,
        latent_shape=latent_shape,
        noising=replace(Noising.plain(num_train_timesteps), **options),
    )


def same(a, b):
    return {
        field.name: bool(np.array_equal(np.asarray(getattr(a, field.name)), np.asarray(getattr(b, field.name))))
        for field in fields(a)
    }


def test_golden_draws():
    """Draws that change would make another run of every run: these numbers may not change."""
    drawn = draw(seed=11, pair_id=-123456789, visit=2, latent_shape=(1, 1, 3))
    assert drawn.timestep == 866
    assert drawn.noise.flatten().tolist() == pytest.approx([0.7173411, -0.3925526, 0.9460289], abs=1e-6)
    assert drawn.chosen_posterior_noise.flatten().tolist() == pytest.approx(
        [-0.7324871, -1.8835959, 0.5060415], abs=1e-6
    )
    assert drawn.rejected_posterior_noise.flatten().tolist() == pytest.approx(
        [1.4836932, -0.6591613, 0.227107], abs=1e-6
    )
    uniform = [drawn.chosen_flip, drawn.rejected_flip, drawn.crop_top, drawn.crop_left, drawn.prompt_dropout]
    assert uniform == pytest.approx(
        [0.6626074368235974, 0.4710175651685311, 0.707098967871119, 0.6873440827486671, 0.5636034959413723], abs=1e-12
    )


def test_each_draw_has_a_philox_generator_keyed_by_its_name():
    message = b"noise\x00" + struct.pack("<3q", 11, -5, 2)
    key = int.from_bytes(hashlib.blake2b(message, digest_size=16).digest(), "little")
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal((4, 2, 2), dtype=np.float32)
    assert np.array_equal(draw(seed=11, pair_id=-5, visit=2).noise.numpy(), expected)


def test_shapes_and_types():
    drawn = draw(latent_shape=(4, 8, 6))
    for noise in (drawn.noise, drawn.chosen_posterior_noise, drawn.rejected_posterior_noise):
        assert noise.shape == (4, 8, 6)
        assert noise.dtype == torch.float32
    assert isinstance(drawn.timestep, int)


@pytest.mark.parametrize("other", [{"seed": 1}, {"pair_id": 2}, {"pair_id": 1 + 2**32}, {"visit": 1}])
def test_seed_pair_and_visit_each_give_other_draws(other):
    # 1 + 2**32: a generator that keeps 32 bits of its seed would not tell it from 1
    options = {"num_train_timesteps": 10**9, "noise_offset": 0.1, "input_perturbation": 0.1}
    assert not any(same(draw(**options), draw(**options, **other)).values())


def test_the_same_key_gives_the_same_draws_whatever_the_global_generators_do():
    first = draw()
    torch.manual_seed(4)
    np.random.default_rng(4)
    torch.randn(3)
    assert all(same(first, draw()).values())


def test_draws_do_not_depend_on_one_another_s_options():
    others_latent = same(draw(), draw(latent_shape=(4, 4, 4)))
    assert {name for name, equal in others_latent.items() if not equal} == {
        "noise",
        "chosen_posterior_noise",
        "rejected_posterior_noise",
    }
    others_timesteps = same(draw(), draw(num_train_timesteps=10))
    assert {name for name, equal in others_timesteps.items() if not equal} == {"timestep"}


SAMPLINGS = {
    "uniform": DiffusionConfig(),
    "range": DiffusionConfig(max_timestep=199),
    "turbo": DiffusionConfig(timestep_sampling="turbo"),
    "logit_normal": DiffusionConfig(timestep_sampling="logit_normal", logit_mean=0, logit_std=1),
}


@pytest.mark.parametrize(
    ("sampling", "timesteps"),
    [
        ("uniform", [864, 875, 254, 59, 559, 918, 418, 796]),  # of before there was a choice
        ("range", [172, 175, 50, 11, 111, 183, 83, 159]),
        ("turbo", [999, 999, 499, 249, 749, 999, 499, 999]),
        ("logit_normal", [282, 762, 363, 246, 260, 222, 740, 794]),
    ],
)
def test_golden_timesteps_in_any_order_and_nothing_else_moves(sampling, timesteps):
    options = {"timesteps": timestep_distribution(SAMPLINGS[sampling], num_train_timesteps=1000)}
    pairs = list(range(8))
    backwards = {pair_id: draw(seed=3, pair_id=pair_id, visit=1, **options).timestep for pair_id in reversed(pairs)}
    assert [backwards[pair_id] for pair_id in pairs] == timesteps
    others = {name: equal for name, equal in same(draw(), draw(**options)).items() if name != "timestep"}
    assert all(others.values())


def philox_normal(name, shape):
    message = name + b"\x00" + struct.pack("<3q", 11, -5, 2)
    key = int.from_bytes(hashlib.blake2b(message, digest_size=16).digest(), "little")
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32))


def test_a_noise_offset_is_one_draw_of_each_channel_in_the_noise_and_moves_nothing_else():
    key = {"seed": 11, "pair_id": -5, "visit": 2, "latent_shape": (4, 3, 2)}
    plain, offset = draw(**key), draw(**key, noise_offset=0.25)
    expected = 0.25 * philox_normal(b"noise_offset", (4, 1, 1)).expand(4, 3, 2)
    torch.testing.assert_close(offset.noise - plain.noise, expected, rtol=0, atol=1e-6)
    assert {name for name, equal in same(plain, offset).items() if not equal} == {"noise"}


def test_input_perturbation_is_shown_to_the_unet_alone_and_moves_nothing_else():
    key = {"seed": 11, "pair_id": -5, "visit": 2, "latent_shape": (4, 3, 2)}
    plain, perturbed = draw(**key), draw(**key, input_perturbation=0.5)
    assert plain.input_noise is None
    expected = plain.noise + 0.5 * philox_normal(b"input_perturbation", (4, 3, 2))
    assert torch.equal(perturbed.input_noise, expected)
    assert {name for name, equal in same(plain, perturbed).items() if not equal} == {"input_noise"}
    both = draw(**key, noise_offset=0.25, input_perturbation=0.5)
    torch.testing.assert_close(
        both.input_noise - both.noise, perturbed.input_noise - perturbed.noise, rtol=0, atol=1e-6
    )


def test_the_three_noises_differ():
    drawn = draw()
    assert not torch.equal(drawn.noise, drawn.chosen_posterior_noise)
    assert not torch.equal(drawn.chosen_posterior_noise, drawn.rejected_posterior_noise)


def test_distributions():
    drawn = [draw(pair_id=pair_id, num_train_timesteps=10) for pair_id in range(1500)]
    counts = np.bincount([each.timestep for each in drawn], minlength=10)
    assert len(counts) == 10
    assert ((counts - 150) ** 2 / 150).sum() < 27.9  # chi-squared, 9 degrees of freedom, once in 1000
    noise = torch.stack([each.noise for each in drawn])  # 24000 numbers
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    for name in ("chosen_flip", "rejected_flip", "crop_top", "crop_left", "prompt_dropout"):
        values = np.array([getattr(each, name) for each in drawn])
        assert values.min() >= 0
        assert values.max() < 1
        assert abs(values.mean() - 0.5) < 0.03  # std 0.0075
    flips = np.array([[each.chosen_flip, each.rejected_flip] for each in drawn])
    assert abs(np.corrcoef(flips.T)[0, 1]) < 0.1
