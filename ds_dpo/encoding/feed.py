"""A run's pairs, and how they become batches: encoded during training, or read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.data import DataConfig
from ds_dpo.config.models import ModelConfig
from ds_dpo.config.run import RunConfig
from ds_dpo.data.reading.held_out_data import held_out_data
from ds_dpo.data.reading.run_pairs import open_held_out_pairs, open_trained_on
from ds_dpo.data.reading.split_files import find_split
from ds_dpo.data.source import PairSource
from ds_dpo.data.stream.loader import PairReader
from ds_dpo.data.stream.prepare import OnlinePairs
from ds_dpo.diffusion.noising import Noising, describe_times, noising_of
from ds_dpo.encoding.cache.fingerprint import fingerprint_of
from ds_dpo.encoding.cache.pairs import CachedPairs, PairCache, open_cache
from ds_dpo.encoding.encoder import CachedEncoder, OnlineEncoder
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.models.conditioning import extras_of
from ds_dpo.models.families.text import TextEncoder, say_nothing
from ds_dpo.models.loading import latent_shape, load_text, load_vae
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.precision import Precision, torch_dtype
from ds_dpo.process.say import Say
from ds_dpo.run_folder.data_set import DataSet

Encode = Callable[[Any], PreferenceBatch]


@dataclass(frozen=True, kw_only=True)
class PairFeed:
    """The pairs of a run.

    pairs: what the loader reads; its samples are decoded images or cached moments. description, counts, fingerprint,
    commit: of the dataset, see data.source. encoding: when and how images are encoded, in words. cache: None if they
    are encoded during training. name_pair: returns the name of the pair at an index, for messages.
    """

    pairs: PairReader[Any]
    description: str
    counts: Mapping[str, int]
    fingerprint: Mapping[str, str]
    encoding: str
    cache: PairCache | None
    name_pair: Callable[[int], str]
    commit: str | None = None

    @property
    def data_set(self) -> DataSet:
        """What a run folder records of the pairs."""
        return DataSet(counts=self.counts, fingerprint=self.fingerprint, commit=self.commit)

    @property
    def needs_encoders(self) -> bool:
        return self.cache is None


def open_feed(config: RunConfig, *, precision: Precision, say: Say) -> PairFeed:
    """Open the pairs that a run trains on. precision: that of the run, in which prompts are encoded.

    Raises DataError if the dataset or cache cannot be read, and ConfigError if the cache does not fit the run.
    """
    process = training_schedule(config.model, config.diffusion)
    noising = noising_of(config.diffusion, process)
    side = config.data.resolution
    for line in describe_times(
        noising, process, latent_shape=latent_shape(config.model, (side, side)), what=f"{side} x {side} pixels"
    ):
        say(line)
    if config.data.cache is None:
        return _online(open_trained_on(config, say=say), config, config.data, config.seed, noising, say=say)
    cache = open_cache(config.data.cache, say=say)
    cache.require_fits(fingerprint_of(config, text_dtype=precision), data=config.data)
    if cache.record.num_pairs == cache.record.num_bad_pairs:
        raise DataError(f"data.cache {config.data.cache}: none of its {cache.record.num_pairs} pairs could be read")
    cached = CachedPairs(cache, data=config.data, seed=config.seed, noising=noising)
    record = cache.record
    return PairFeed(
        pairs=cached,
        description=record.source_description,
        counts=record.source_counts,
        fingerprint=record.source_fingerprint,
        encoding=f"{record.images.quantity} of a cache in {record.images.dtype}",
        cache=cache,
        name_pair=lambda index: f"pair {index} of cache {cache.folder}",
    )


def open_held_out(config: RunConfig, trained_on: PairFeed, *, say: Say) -> PairFeed:
    """Open the pairs of the held_out section: read, filtered and cut like those that are trained on, without chance.

    So there is no flip, no random crop, no dropped prompt, and no tie. Raises DataError if they cannot be read, and
    ConfigError if they are the pairs that are trained on.
    """
    data = held_out_data(config)
    # plain, because the evaluation grid draws its own noise
    noising = Noising.plain(training_schedule(config.model, config.diffusion).num_train_timesteps)
    feed = _online(open_held_out_pairs(config, say=say), config, data, config.held_out.seed, noising, say=say)
    if config.held_out.share is not None:
        return feed  # the same rows, divided by prompt
    if feed.fingerprint["content"] == trained_on.fingerprint["content"] or _local_files(data) & _local_files(
        config.data
    ):
        raise ConfigError(
            f"held_out: split {data.split} of {data.dataset} has the same rows as the training data; set another "
            "held_out.split or held_out.dataset"
        )
    return feed


def _local_files(data: DataConfig) -> set[Path]:
    """Return the files of a local dataset's split: a file may be named alone, or by its folder."""
    if not Path(resolve_asset(data.dataset)).expanduser().exists():
        return set()
    return {path.resolve() for path in find_split(data).files}


def _online(
    source: PairSource, config: RunConfig, data: DataConfig, seed: int, noising: Noising, *, say: Say
) -> PairFeed:
    say(source.description)
    if source.commit is not None:
        say(f"{data.dataset} is read at commit {source.commit}; data.revision {source.commit} reads the same again")
    online = OnlinePairs(
        source,
        data=data,
        seed=seed,
        latent_shape=partial(latent_shape, config.model),
        noising=noising,
    )
    return PairFeed(
        pairs=online,
        description=source.description,
        counts=source.counts,
        fingerprint=source.fingerprint,
        encoding="as they come",
        cache=None,
        name_pair=lambda index: source.read(index).uid,
        commit=source.commit,
    )


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen models other than the denoiser."""

    vae: AutoencoderKL
    text: TextEncoder

    def to(self, device: torch.device) -> Encoders:
        """Move the models and return this object, as a module does."""
        self.vae.to(device)
        self.text.to(device)
        return self


def load_encoders(config: RunConfig, *, dtype: torch.dtype, say: Say = say_nothing) -> Encoders:
    """Load VAE and text encoders on the host. Raises ModelError.

    dtype: of the text encoders; model.vae_dtype is the VAE's. say: gets a line on prompts that are too long.
    """
    return Encoders(vae=load_vae(config.model), text=load_text(config.model, dtype=dtype, say=say))


def build_encode(feed: PairFeed, encoders: Encoders | None, *, model: ModelConfig, device: torch.device) -> Encode:
    """Return the function from samples to a batch. encoders: None if the feed is a cache.

    Raises ModelError for a guidance that the model's denoiser does not take.
    """
    extras = extras_of(model)
    if feed.cache is not None:
        stored = feed.cache.record.images
        return CachedEncoder(
            quantity=stored.quantity,
            vae_dtype=torch_dtype(stored.vae_dtype),
            vae_config=stored.scaling,
            extras=extras,
            device=device,
        )
    assert encoders is not None, "loaded if the feed needs them"
    return OnlineEncoder(vae=encoders.vae, text=encoders.text, extras=extras, device=device)
