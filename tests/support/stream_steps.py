"""Streams of pairs, the steps that any number of ranks takes from them, and where two lists of steps differ."""

from dataclasses import fields
from itertools import islice

import torch
from pair_files import config

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.data.stream.loader import open_stream
from ds_dpo.data.stream.prepare import OnlinePairs, join_samples
from ds_dpo.diffusion.noising import Noising
from ds_dpo.diffusion.timesteps import timestep_distribution

PAIRS_PER_STEP = 8
RANDOM = {"crop": "random", "flip": "independent", "prompt_dropout": 0.3, "size_conditioning": "true"}
# all draws that there are
NOISING = Noising(
    timesteps=timestep_distribution(
        DiffusionConfig(timestep_sampling="logit_normal", logit_mean=0, logit_std=1), num_train_timesteps=1000
    ),
    noise_offset=0.1,
    input_perturbation=0.1,
)


def stream_of(source, *, rank=0, world=1, micro=8, pairs_seen=0, seed=3, say=None, **fields):
    data = config(**fields)
    pairs = OnlinePairs(source, data=data, seed=seed, latent_shape=lambda size: (4, 2, 2), noising=NOISING)
    return open_stream(
        pairs,
        data=data,
        seed=seed,
        pairs_per_step=PAIRS_PER_STEP,
        micro_batch_pairs=micro,
        rank=rank,
        world_size=world,
        pairs_seen=pairs_seen,
        say=say or (lambda line: None),
    )


def steps_of(source, num_steps, *, world=1, micro=8, **options):
    """Return the pairs of each step in their global order, whoever computed them."""
    accumulation = PAIRS_PER_STEP // (world * micro)
    streams = [iter(stream_of(source, rank=rank, world=world, micro=micro, **options)) for rank in range(world)]
    return [
        join_samples([part for stream in streams for part in islice(stream, accumulation)]) for _ in range(num_steps)
    ]


def differing(steps, others):
    """Names of fields that are not equal in every step."""
    assert len(steps) == len(others)
    pairs = list(zip(steps, others, strict=True))
    names = [field.name for field in fields(steps[0])]
    return {name for name in names for a, b in pairs if not equal(getattr(a, name), getattr(b, name))}


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
