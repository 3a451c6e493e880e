"""Turn pairs of a dataset and their random draws into the tensors of a step.

Legend: B pairs; C,H,W latent; X,Y pixels. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from ds_dpo.batch import PairSamples
from ds_dpo.config.data import DataConfig
from ds_dpo.data.images import CutImage, cut_image, decode_rgb
from ds_dpo.data.source import BadRowError, PairRecord, PairSource, RawImage
from ds_dpo.data.stream.draws import PairDraws, draw_pair
from ds_dpo.diffusion.noising import Noising
from ds_dpo.errors import DataError

S = TypeVar("S")


class OnlinePairs:
    """A loader.PairReader of PairSamples: the pairs of a source, decoded when they are read."""

    def __init__(
        self,
        source: PairSource,
        *,
        data: DataConfig,
        seed: int,
        latent_shape: Callable[[tuple[int, int]], tuple[int, int, int]],
        noising: Noising,
    ) -> None:
        """data, seed, noising: what draws depend on. latent_shape: returns (C, H, W) for the size of an image."""
        self.bucket_sizes: Sequence[int] = source.bucket_sizes
        self._bucket_ends = list(accumulate(source.bucket_sizes))
        self._shapes = list(source.bucket_shapes)
        self._latent_shapes = [latent_shape(shape) for shape in self._shapes]
        self._source = source
        self._data = data
        self._seed = seed
        self._noising = noising

    def read(self, index: int, visit: int) -> PairSamples:
        """Return a pair with the draws of a visit, B = 1. Raises BadRowError if row or images cannot be used."""
        bucket = bisect_right(self._bucket_ends, index)
        record = self._source.read(index)
        draws = draw_pair(
            seed=self._seed,
            pair_id=record.pair_id,
            visit=visit,
            latent_shape=self._latent_shapes[bucket],
            noising=self._noising,
        )
        return prepare_pair(record, draws, data=self._data, size=self._shapes[bucket])

    def join(self, parts: list[PairSamples]) -> PairSamples:
        """Concatenate samples of one bucket."""
        return join_samples(parts)


def prepare_pair(record: PairRecord, draws: PairDraws, *, data: DataConfig, size: tuple[int, int]) -> PairSamples:
    """Return a pair with its images cut to the size, B = 1. Raises BadRowError if one of them cannot be used."""
    rejected_flip = draws.rejected_flip if data.flip == "independent" else draws.chosen_flip
    crop_fractions = (draws.crop_top, draws.crop_left) if data.crop == "random" else None

    def cut(side: str, raw: RawImage | None, flip: float) -> CutImage:
        try:
            is_flipped = data.flip != "off" and flip < 0.5
            return cut_image(decode_rgb(raw), size=size, is_flipped=is_flipped, crop_fractions=crop_fractions)
        except DataError as error:
            raise BadRowError(record.uid, f"{side} image: {error}") from error

    chosen = cut("chosen", record.chosen, draws.chosen_flip)
    rejected = cut("rejected", record.rejected, rejected_flip)
    return PairSamples(
        chosen_pixels=chosen.pixels[None],
        rejected_pixels=rejected.pixels[None],
        prompts=["" if draws.prompt_dropout < data.prompt_dropout else record.prompt],
        chosen_time_ids=time_ids(chosen.original_size, chosen.corner, size, data=data)[None],
        rejected_time_ids=time_ids(rejected.original_size, rejected.corner, size, data=data)[None],
        timesteps=torch.tensor([draws.timestep], dtype=torch.int64),
        noise=draws.noise[None],
        input_noise=None if draws.input_noise is None else draws.input_noise[None],
        chosen_posterior_noise=draws.chosen_posterior_noise[None],
        rejected_posterior_noise=draws.rejected_posterior_noise[None],
        pair_ids=torch.tensor([record.pair_id], dtype=torch.int64),
        target_probabilities=torch.tensor([record.target_probability], dtype=torch.float32),
        weights=torch.tensor([record.weight], dtype=torch.float32),
    )


def time_ids(
    original_size: tuple[int, int], corner: tuple[int, int], size: tuple[int, int], *, data: DataConfig
) -> Tensor:
    """Return SDXL's size conditioning: original height, width, crop top, left, target height, width; (6,) fp32.

    original_size, corner: of a CutImage. size: of the training image. Source: arXiv:2307.01952, section 2.2;
    data.size_conditioning fixed is that of the authors' train.py, true that of diffusers' SDXL scripts.
    """
    values = (*size, 0, 0, *size) if data.size_conditioning == "fixed" else (*original_size, *corner, *size)
    return torch.tensor(values, dtype=torch.float32)


def join_samples(parts: list[S]) -> S:
    """Concatenate samples, dataclasses of tensors and lists, in their order; None stays None."""
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):  # type: ignore[arg-type]
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
        else:
            joined[field.name] = None if values[0] is None else [value for part in values for value in part]
    return type(parts[0])(**joined)
