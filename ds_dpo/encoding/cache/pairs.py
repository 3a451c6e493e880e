"""A cache of encoded pairs, read by the loader: the same draws as with images, but moments instead of pixels.

Legend: B pairs; C,H,W latent; L text tokens; D text width; P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.batch import CachedSamples
from ds_dpo.config.data import DataConfig
from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.draws import PairDraws, draw_pair
from ds_dpo.data.stream.prepare import join_samples, time_ids
from ds_dpo.diffusion.noising import Noising
from ds_dpo.encoding.cache.reading import OpenFiles, RowFile
from ds_dpo.encoding.cache.record import (
    BAD_PAIRS,
    EMPTY_PROMPT_ROW,
    IMAGE_ROW,
    IMAGES,
    PAIR_ROW,
    PAIRS,
    PROMPT_ROW,
    PROMPTS,
    CacheRecord,
    read_record,
)
from ds_dpo.encoding.cache.shard_file import BATCH_ROWS, opened_shard
from ds_dpo.making.record import check_sizes, differences, refuse_if_stale
from ds_dpo.precision import torch_dtype
from ds_dpo.process.say import Say


class PairCache:
    """A finished cache; only its record is in memory."""

    def __init__(self, folder: Path) -> None:
        """Read the record and compare the files' sizes. Raises DataError if a file is missing or cut short."""
        self.folder = folder
        self.record: CacheRecord = read_record(folder)
        check_sizes(folder, self.record.files)
        self._files = OpenFiles(folder)
        self.pairs = RowFile(self._files, folder, PAIRS, PAIR_ROW)
        self.images = RowFile(self._files, folder, IMAGES, IMAGE_ROW)
        self.prompts = RowFile(self._files, folder, PROMPTS, PROMPT_ROW)

    @property
    def description(self) -> str:
        """What the cache holds, for the log."""
        record = self.record
        stored = record.images
        variants = ", and mirrored" if stored.mirrored else ""
        size = sum(file.size for file in record.files.values())
        return (
            f"cache {self.folder}: {record.num_pairs} pairs ({record.num_bad_pairs} bad) of {record.num_images} "
            f"distinct images ({stored.quantity} in {stored.dtype}{variants}) and {record.num_prompts} distinct "
            f"prompts ({record.text.dtype}), {size / 1e9:.2f} GB; made of {record.source_description}"
        )

    def require_fits(self, wanted: Mapping[str, str], *, data: DataConfig) -> None:
        """Raise ConfigError that names each part in which the cache is not what a run needs.

        wanted: the run's fingerprint, with the same names as in the cache's record.
        """
        changes = differences(self.record.fingerprint, wanted, asker="this run")
        if data.flip != "off" and not self.record.images.mirrored:
            changes.append(
                f"data.flip: {data.flip} needs mirrored images, which the cache does not have (scripts/cache.py "
                "--flips stores them); off fits this cache"
            )
        why = "it was not made from what this run trains on"
        refuse_if_stale("data.cache", self.folder, changes, why=why, program="scripts/cache.py")

    def image(self, row: Any, *, is_mirrored: bool) -> Tensor:
        """Return the stored moments (2C, H, W), or mean (C, H, W), of an IMAGE_ROW, in the cache's dtype."""
        stored = self.record.images
        return self._files.tensor(
            self.record.image_shards[row["shard"]],
            int(row["mirrored" if is_mirrored else "moments"]),
            shape=stored.shape(self.record.bucket_shapes[row["bucket"]]),
            dtype=torch_dtype(stored.dtype),
        )

    def prompt(self, row: Any) -> tuple[Tensor, Tensor | None]:
        """Return text states (L, D), and pooled text (P,) or None, of a PROMPT_ROW."""
        text, shard = self.record.text, self.record.prompt_shards[row["shard"]]
        dtype = torch_dtype(text.dtype)
        states = self._files.tensor(shard, int(row["text_states"]), shape=text.states_shape, dtype=dtype)
        if text.pooled_width is None:
            return states, None
        return states, self._files.tensor(shard, int(row["pooled"]), shape=(text.pooled_width,), dtype=dtype)

    def bad_pair(self, row: int) -> BadRowError:
        """Return the error that reading the pair raised when the cache was made."""
        with opened_shard(self.folder / BAD_PAIRS) as (_, reader):
            batch, place = divmod(row, BATCH_ROWS)
            found = reader.get_batch(batch).slice(place, 1).to_pylist()[0]
        return BadRowError(found["uid"], found["reason"])


def open_cache(folder: str | Path, *, say: Say) -> PairCache:
    """Open a finished cache, and say what it holds. Raises DataError if it is not complete."""
    cache = PairCache(Path(folder).expanduser())
    say(cache.description)
    return cache


class CachedPairs:
    """The pairs of a cache for the loader; a loader.PairReader of CachedSamples."""

    def __init__(self, cache: PairCache, *, data: DataConfig, seed: int, noising: Noising) -> None:
        """cache: must fit the run. data: sets flips, dropped prompts and size conditioning."""
        self._cache, self._data = cache, data
        self._seed, self._noising = seed, noising

    def __len__(self) -> int:
        return len(self._cache.pairs)

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of pairs of each bucket."""
        return self._cache.record.bucket_sizes

    def read(self, index: int, visit: int) -> CachedSamples:
        """Return a pair as CachedSamples with B = 1. Raises BadRowError if it was unreadable when it was encoded."""
        pair = self._cache.pairs[index]
        if pair["bad"] >= 0:
            raise self._cache.bad_pair(int(pair["bad"]))
        draws = self._draw(pair, visit)
        rejected_flip = draws.rejected_flip if self._data.flip == "independent" else draws.chosen_flip
        chosen, chosen_time_ids = self._image(pair, "chosen", flip=draws.chosen_flip)
        rejected, rejected_time_ids = self._image(pair, "rejected", flip=rejected_flip)
        is_dropped = draws.prompt_dropout < self._data.prompt_dropout
        states, pooled = self._cache.prompt(
            self._cache.prompts[EMPTY_PROMPT_ROW if is_dropped else int(pair["prompt"])]
        )
        return CachedSamples(
            chosen_moments=chosen[None],
            rejected_moments=rejected[None],
            text_states=states[None],
            pooled=None if pooled is None else pooled[None],
            chosen_time_ids=chosen_time_ids[None],
            rejected_time_ids=rejected_time_ids[None],
            timesteps=torch.tensor([draws.timestep], dtype=torch.int64),
            noise=draws.noise[None],
            input_noise=None if draws.input_noise is None else draws.input_noise[None],
            chosen_posterior_noise=draws.chosen_posterior_noise[None],
            rejected_posterior_noise=draws.rejected_posterior_noise[None],
            pair_ids=torch.tensor([int(pair["pair_id"])], dtype=torch.int64),
            target_probabilities=torch.tensor([float(pair["target_probability"])], dtype=torch.float32),
            weights=torch.tensor([float(pair["weight"])], dtype=torch.float32),
        )

    def join(self, parts: list[CachedSamples]) -> CachedSamples:
        """Concatenate samples of one bucket."""
        return join_samples(parts)

    def _draw(self, pair: Any, visit: int) -> PairDraws:
        images = self._cache.record.images
        height, width = self._cache.record.bucket_shapes[pair["bucket"]]
        return draw_pair(
            seed=self._seed,
            pair_id=int(pair["pair_id"]),
            visit=visit,
            latent_shape=(images.channels, height // images.factor, width // images.factor),
            noising=self._noising,
        )

    def _image(self, pair: Any, side: str, *, flip: float) -> tuple[Tensor, Tensor]:
        row = self._cache.images[int(pair[side])]
        moments = self._cache.image(row, is_mirrored=self._data.flip != "off" and flip < 0.5)
        original_size = int(row["original_height"]), int(row["original_width"])
        corner = int(row["corner_top"]), int(row["corner_left"])
        size = self._cache.record.bucket_shapes[row["bucket"]]
        return moments, time_ids(original_size, corner, size, data=self._data)
