"""What training, data_stats and cache.py make of one set, in the same terms: numbers of images, or why not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drawn_pairs import NUM_IMAGES, image_file

from ds_dpo.config.run import RunConfig
from ds_dpo.data.images import cut_image, decode_rgb, file_bytes
from ds_dpo.data.reading.run_pairs import open_trained_on
from ds_dpo.data.source import BadRow, BadRowError, PairRecord, PairSource
from ds_dpo.data.statistics.statistics import take_statistics
from ds_dpo.data.stream.prepare import OnlinePairs
from ds_dpo.diffusion.noising import Noising
from ds_dpo.distributed.environment import read_environment
from ds_dpo.encoding.cache import write
from ds_dpo.encoding.cache.pairs import CachedPairs, PairCache
from ds_dpo.encoding.cache.plan import Request
from ds_dpo.encoding.cache.record import StoredText
from ds_dpo.encoding.cache.unit import CutVariants
from ds_dpo.errors import DataError
from ds_dpo.making.make import make
from ds_dpo.models.loading import latent_shape

CPU = torch.device("cpu")
NOISING = Noising.plain(1000)


@dataclass(frozen=True)
class Read:
    """A pair as a program reads it. chosen, rejected: numbers of images."""

    prompt: str | bytes
    chosen: int
    rejected: int
    pair_id: int
    target: float
    weight: float


@dataclass(frozen=True)
class Outcome:
    """refusal: an error's words, or None. pairs: in file order, a bad row as its name and reason."""

    refusal: str | None
    pairs: Sequence[Read | str] = ()
    counts: Mapping[str, int] | None = None


def _outcome(read: Callable[[RunConfig, Path], Outcome]) -> Callable[[RunConfig, Path], Outcome]:
    def outcome(config: RunConfig, cache_dir: Path) -> Outcome:
        data = config.data.model_copy(update={"cache_dir": str(cache_dir)})
        try:
            return read(config.model_copy(update={"data": data}), cache_dir)
        except DataError as error:
            return Outcome(refusal=str(error))

    return outcome


@_outcome
def of_training(config: RunConfig, cache_dir: Path) -> Outcome:
    """What the loader reads, at each index once."""
    source = open_trained_on(config, say=_silent)
    pairs = OnlinePairs(
        source,
        data=config.data,
        seed=0,
        latent_shape=lambda shape: latent_shape(config.model, shape),
        noising=NOISING,
    )
    read = _each(
        source,
        pairs,
        lambda sample: (
            sample.prompts[0],
            number_of_pixels(sample.chosen_pixels[0]),
            number_of_pixels(sample.rejected_pixels[0]),
        ),
    )
    return Outcome(None, read, source.counts)


@_outcome
def of_data_stats(config: RunConfig, cache_dir: Path) -> Outcome:
    """What data_stats counts and shows; it decodes all images."""
    source = open_trained_on(config, say=_silent, in_file_order=True)
    shown: list[PairRecord | BadRow] = []
    statistics = take_statistics(
        source, looked_into=np.arange(len(source)), on_pair=lambda _, pair: shown.append(pair), threads=1
    )
    bad = {row.uid: str(row) for row in statistics.bad_pairs}
    read = [bad[pair.uid] if pair.uid in bad else _of_record(pair) for pair in shown]
    assert len(bad) == len(statistics.bad_pairs) == sum(isinstance(each, str) for each in read)
    return Outcome(None, read, statistics.counts)


@_outcome
def of_cache(config: RunConfig, cache_dir: Path) -> Outcome:
    """What a run reads from a cache made of the set; the encoders store numbers of images, and prompts."""
    source = open_trained_on(config, say=_silent, in_file_order=True)
    request = Request(
        config=config,
        text_dtype="fp32",
        out=cache_dir / "encoded",
        quantity="moments",
        dtype="fp32",
        mirrored=False,
        shard_pairs=4,
        images_at_once=None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "load_encoders", _NumberingEncoders)
        make(_making(request, source))
    cached = PairCache(request.out)
    pairs = CachedPairs(cached, data=config.data, seed=0, noising=NOISING)
    read = _each(
        source,
        pairs,
        lambda sample: (
            _text_of(sample.text_states[0]),
            int(sample.chosen_moments.max()),
            int(sample.rejected_moments.max()),
        ),
    )
    return Outcome(None, read, cached.record.source_counts)


def _each(source: PairSource, pairs: Any, prompt_and_images: Callable[[Any], tuple[str, int, int]]) -> list[Read | str]:
    """Read each pair in file order. prompt_and_images: of a sample, its prompt and the numbers of its images."""
    read: list[Read | str] = []
    for index in source.file_order().tolist():
        try:
            sample = pairs.read(index, 0)
        except BadRowError as error:
            read.append(str(error.bad_row))
            continue
        ids, targets, weights = sample.pair_ids, sample.target_probabilities, sample.weights
        read.append(Read(*prompt_and_images(sample), int(ids[0]), float(targets[0]), float(weights[0])))
    return read


def _making(request: Request, source: PairSource) -> write.PairCacheMaking:
    place = read_environment({})
    return write.PairCacheMaking(
        request=request, source=source, fingerprint={"set": "drawn"}, place=place, device=CPU, say=_silent
    )


TEXT_BYTES = 1280


class _NumberingEncoders:
    """Encoders that store an image's number in place of its latent, and a prompt's bytes in place of its states."""

    def __init__(self, *_: Any, images: Any, **__: Any) -> None:
        self.images, self.images_at_once, self.text = images, None, self
        self.cut_prompts: Sequence[str] = ()

    def stored_text(self) -> StoredText:
        return StoredText(states_shape=(1, TEXT_BYTES), pooled_width=None, dtype="fp32")

    def encode(self, prompts: Sequence[str]) -> Any:
        rows = [list(prompt.encode().ljust(TEXT_BYTES, b"\0")) for prompt in prompts]
        return SimpleNamespace(text_states=torch.tensor(rows, dtype=torch.float32)[:, None], pooled=None)

    def encode_variants(self, images: Sequence[CutVariants]) -> list[torch.Tensor]:
        shape = self.images.shape(images[0].variants.shape[-2:])
        return [torch.full((1, *shape), float(number_of_pixels(image.variants[0]))) for image in images]


def _text_of(states: torch.Tensor) -> str:
    return bytes(states[0].to(torch.uint8).tolist()).rstrip(b"\0").decode()


def _of_record(record: PairRecord | BadRow) -> Read:
    assert isinstance(record, PairRecord), "a bad row is among the bad pairs"
    numbers = [_number_of_file(file_bytes(raw)) for raw in (record.chosen, record.rejected)]
    return Read(
        record.prompt,
        *numbers,
        record.pair_id,
        float(np.float32(record.target_probability)),
        float(np.float32(record.weight)),
    )


@cache
def _files() -> Mapping[bytes, int]:
    return {image_file(number): number for number in range(NUM_IMAGES)}


def _number_of_file(content: bytes) -> int:
    return _files()[content]


@cache
def _digests(shape: tuple[int, int]) -> Mapping[bytes, int]:
    cuts = (
        cut_image(decode_rgb(image_file(number)), size=shape, is_flipped=False, crop_fractions=None)
        for number in range(NUM_IMAGES)
    )
    return {_digest(cut.pixels): number for number, cut in enumerate(cuts)}


def _digest(pixels: torch.Tensor) -> bytes:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest()


def number_of_pixels(pixels: torch.Tensor) -> int:
    """Return the number of the image that was cut to (3, H, W) pixels."""
    return _digests((pixels.shape[-2], pixels.shape[-1]))[_digest(pixels)]


def _silent(*_: object) -> None:
    pass
