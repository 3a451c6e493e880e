"""All random draws of a pair: they depend on (seed, pair id, visit) and on nothing else.

Each draw has its own generator, so turning on flips or a noise offset changes no other draw. Everything except the two
noise options is drawn whether or not an option uses it.
Legend: C,H,W latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_dpo.data.keyed_hash import keyed_hash
from ds_dpo.diffusion.noising import Noising


@dataclass(frozen=True, kw_only=True)
class PairDraws:
    """The random draws of one visit of a pair.

    timestep: from the run's distribution for images of this size. noise: (C, H, W) fp32, from which the target is made:
    standard normal plus the offset. input_noise: (C, H, W), the noise in the denoiser's input; None if it is the same.
    chosen_posterior_noise, rejected_posterior_noise: (C, H, W) standard normal. chosen_flip, rejected_flip, crop_top,
    crop_left, prompt_dropout: uniform in [0, 1), before an option is applied to them.
    """

    timestep: int
    noise: Tensor
    input_noise: Tensor | None
    chosen_posterior_noise: Tensor
    rejected_posterior_noise: Tensor
    chosen_flip: float
    rejected_flip: float
    crop_top: float
    crop_left: float
    prompt_dropout: float


def draw_pair(
    *, seed: int, pair_id: int, visit: int, latent_shape: tuple[int, int, int], noising: Noising
) -> PairDraws:
    """Draw everything for one visit of a pair, on the CPU. seed, pair_id: signed 64-bit. latent_shape: C, H, W.

    Source of noise offset and input perturbation: examples/text_to_image/train_text_to_image.py of
    huggingface/diffusers; arXiv:2301.11706.
    """

    def generator(name: str) -> np.random.Generator:
        # numpy's Philox, because torch's CPU generator keeps only 32 bits of its seed, so pairs of a large dataset
        # would share draws, and because torch's normal draws depend on the processor's vector unit
        return np.random.Generator(np.random.Philox(key=keyed_hash(name, seed, pair_id, visit, bits=128)))

    def normal(name: str, shape: tuple[int, int, int] = latent_shape) -> Tensor:
        return torch.from_numpy(generator(name).standard_normal(shape, dtype=np.float32))

    noise, input_noise = normal("noise"), None
    if noising.noise_offset:
        noise += noising.noise_offset * normal("noise_offset", (latent_shape[0], 1, 1))
    if noising.input_perturbation:
        input_noise = noise + noising.input_perturbation * normal("input_perturbation")
    flips, crop = generator("flip").random(2), generator("crop").random(2)
    return PairDraws(
        timestep=noising.timesteps.at(latent_shape).draw(generator("timestep")),
        noise=noise,
        input_noise=input_noise,
        chosen_posterior_noise=normal("chosen_posterior_noise"),
        rejected_posterior_noise=normal("rejected_posterior_noise"),
        chosen_flip=float(flips[0]),
        rejected_flip=float(flips[1]),
        crop_top=float(crop[0]),
        crop_left=float(crop[1]),
        prompt_dropout=float(generator("prompt_dropout").random()),
    )
