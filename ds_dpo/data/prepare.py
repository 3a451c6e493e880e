"""One pair of a dataset, and its draws, into the tensors that a step takes.

Legend: B pairs; C,H,W latent; X,Y pixels.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ds_dpo.batch import PairSamples
from ds_dpo.config import DataConfig
from ds_dpo.data.draws import PairDraws
from ds_dpo.data.images import Square, cut_square, decode_rgb
from ds_dpo.data.source import BadRowError, PairRecord, RawImage
from ds_dpo.errors import DataError


def prepare_pair(record: PairRecord, draws: PairDraws, *, data: DataConfig) -> PairSamples:
    """Return a pair as PairSamples with B = 1. Raises BadRowError where one of its images cannot be used."""
    rejected_flip = draws.rejected_flip if data.flip == "independent" else draws.chosen_flip
    chosen = _square(record, "chosen", record.chosen, flip=draws.chosen_flip, draws=draws, data=data)
    rejected = _square(record, "rejected", record.rejected, flip=rejected_flip, draws=draws, data=data)
    return PairSamples(
        chosen_pixels=chosen.pixels[None],
        rejected_pixels=rejected.pixels[None],
        prompts=["" if draws.prompt_dropout < data.prompt_dropout else record.prompt],
        chosen_time_ids=time_ids(chosen, data=data)[None],
        rejected_time_ids=time_ids(rejected, data=data)[None],
        timesteps=torch.tensor([draws.timestep], dtype=torch.int64),
        noise=draws.noise[None],
        chosen_posterior_noise=draws.chosen_posterior_noise[None],
        rejected_posterior_noise=draws.rejected_posterior_noise[None],
        pair_ids=torch.tensor([record.pair_id], dtype=torch.int64),
        target_probabilities=torch.tensor([record.target_probability], dtype=torch.float32),
        weights=torch.tensor([record.weight], dtype=torch.float32),
    )


def _square(
    record: PairRecord, side: str, raw: RawImage | None, *, flip: float, draws: PairDraws, data: DataConfig
) -> Square:
    try:
        return cut_square(
            decode_rgb(raw),
            resolution=data.resolution,
            is_flipped=data.flip != "off" and flip < 0.5,
            crop_fractions=(draws.crop_top, draws.crop_left) if data.crop == "random" else None,
        )
    except DataError as error:
        raise BadRowError(record.uid, f"{side} image: {error}") from error


def time_ids(square: Square, *, data: DataConfig) -> Tensor:
    """Return what SDXL is told of sizes: original height, width, crop top, left, target height, width; (6,) fp32.

    Source: arXiv:2307.01952, section 2.2; fixed as in the authors' train.py, true as in diffusers' SDXL scripts.
    """
    target = (data.resolution, data.resolution)
    told = (*target, 0, 0, *target) if data.size_conditioning == "fixed" else _true_sizes(square, target)
    return torch.tensor(told, dtype=torch.float32)


def _true_sizes(square: Square, target: tuple[int, int]) -> tuple[int, ...]:
    return (*square.original_size, *square.corner, *target)


def join_samples(parts: list[PairSamples]) -> PairSamples:
    """Put samples behind one another into one, in their order."""
    joined: dict[str, Any] = {}
    for field in fields(PairSamples):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = (
            torch.cat(values) if isinstance(values[0], Tensor) else [v for part in values for v in part]
        )
    return PairSamples(**joined)
