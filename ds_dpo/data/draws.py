"""Every random draw of a pair, keyed by the pair: a function of (seed, pair id, visit) and of nothing else.

Each draw has a generator of its own, and all are drawn whatever the options: turning flips on moves no noise.
Legend: C,H,W latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_dpo.data.keyed_hash import keyed_hash


@dataclass(frozen=True, kw_only=True)
class PairDraws:
    """What chance decides about one visit of a pair.

    timestep: in [0, num_train_timesteps). noise, chosen_posterior_noise, rejected_posterior_noise: (C, H, W) fp32
    standard normal. chosen_flip, rejected_flip, crop_top, crop_left, prompt_dropout: uniform in [0, 1), before any
    option is applied to them.
    """

    timestep: int
    noise: Tensor
    chosen_posterior_noise: Tensor
    rejected_posterior_noise: Tensor
    chosen_flip: float
    rejected_flip: float
    crop_top: float
    crop_left: float
    prompt_dropout: float


def draw_pair(
    *, seed: int, pair_id: int, visit: int, latent_shape: tuple[int, int, int], num_train_timesteps: int
) -> PairDraws:
    """Draw everything for one visit of a pair, on the CPU. seed, pair_id: signed 64-bit. latent_shape: C, H, W."""

    def generator(name: str) -> np.random.Generator:
        # numpy's Philox: torch's CPU generator keeps 32 bits of its seed, which pairs of a large dataset would come to
        # share, and its normal draws depend on the processor's vector unit
        return np.random.Generator(np.random.Philox(key=keyed_hash(name, seed, pair_id, visit, bits=128)))

    def normal(name: str) -> Tensor:
        return torch.from_numpy(generator(name).standard_normal(latent_shape, dtype=np.float32))

    flips, crop = generator("flip").random(2), generator("crop").random(2)
    return PairDraws(
        timestep=int(generator("timestep").integers(num_train_timesteps)),
        noise=normal("noise"),
        chosen_posterior_noise=normal("chosen_posterior_noise"),
        rejected_posterior_noise=normal("rejected_posterior_noise"),
        chosen_flip=float(flips[0]),
        rejected_flip=float(flips[1]),
        crop_top=float(crop[0]),
        crop_left=float(crop[1]),
        prompt_dropout=float(generator("prompt_dropout").random()),
    )
