"""A cache of encoded pairs on disk: its files, the columns of its tables, and cache.json, which is written last.

    cache.json          CacheRecord: what was encoded by which models; size and SHA-256 of every other file
    pairs.npy           a PAIR_ROW for each pair, in the source's order
    images.npy          an IMAGE_ROW for each distinct image: where its bytes are
    prompts.npy         a PROMPT_ROW for each distinct prompt
    bad_pairs.arrow     uid and reason of each pair that cannot be read
    images/ prompts/    shards: Arrow IPC files, see shard_file.py
    work/               exists only while the cache is made

A folder without cache.json is not a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import model_validator

from ds_dpo.making.folder import work_of
from ds_dpo.making.record import RecordPart, read_record_file
from ds_dpo.precision import Precision, torch_dtype
from ds_dpo.storage.manifest import FileEntry, leads_outside

FORMAT_VERSION = 1
RECORD_NAME = "cache.json"
PAIRS, IMAGES, PROMPTS, BAD_PAIRS = "pairs.npy", "images.npy", "prompts.npy", "bad_pairs.arrow"
IMAGE_SHARDS, PROMPT_SHARDS = "images", "prompts"
EMPTY_PROMPT_ROW = 0  # '' is the first prompt of every cache, and stands for dropped prompts

# chosen, rejected, prompt: rows of images.npy and prompts.npy. bad: row of bad_pairs.arrow, -1 for a good pair.
PAIR_ROW = np.dtype(
    [
        ("pair_id", "<i8"),
        ("chosen", "<i8"),
        ("rejected", "<i8"),
        ("prompt", "<i8"),
        ("target_probability", "<f4"),
        ("weight", "<f4"),
        ("bucket", "<i4"),
        ("bad", "<i4"),
    ]
)
# moments, mirrored: offsets in bytes from the start of the shard, -1 if not stored. original_*: pixels, upright.
# corner_*: where the crop begins. bucket: -1 if the image cannot be decoded.
IMAGE_ROW = np.dtype(
    [
        ("moments", "<i8"),
        ("mirrored", "<i8"),
        ("shard", "<i4"),
        ("bucket", "<i4"),
        ("original_height", "<i4"),
        ("original_width", "<i4"),
        ("corner_top", "<i4"),
        ("corner_left", "<i4"),
    ]
)
PROMPT_ROW = np.dtype([("text_states", "<i8"), ("pooled", "<i8"), ("shard", "<i8")])

Quantity = Literal["moments", "mean"]


class StoredImages(RecordPart):
    """How images are stored.

    quantity: moments or mean of the VAE's posterior. mirrored: whether each image is also stored mirrored. channels: C
    of the latent. factor: pixels of the image's side for each value of the latent's. vae_dtype: precision in which the
    VAE ran. scaling: shift and scale of latents, from the VAE's config.
    """

    quantity: Quantity
    dtype: Precision
    mirrored: bool
    channels: int
    factor: int
    vae_dtype: Precision
    scaling: dict[str, float | list[float] | None]

    def shape(self, pixels: tuple[int, int]) -> tuple[int, int, int]:
        """Return the stored shape of an image of (height, width) pixels: (2C, H, W), or (C, H, W) for a mean."""
        channels = self.channels * (2 if self.quantity == "moments" else 1)
        return channels, pixels[0] // self.factor, pixels[1] // self.factor

    def num_bytes(self, pixels: tuple[int, int]) -> int:
        """Return the bytes of one variant of an image."""
        return int(np.prod(self.shape(pixels))) * torch_dtype(self.dtype).itemsize


class StoredText(RecordPart):
    """How prompts are stored.

    states_shape: (L, D). pooled_width: P, None if the family has no pooled text. dtype: that of the text encoders.
    """

    states_shape: tuple[int, int]
    pooled_width: int | None
    dtype: Precision

    def num_bytes(self) -> int:
        """Return the bytes of one prompt."""
        return (int(np.prod(self.states_shape)) + (self.pooled_width or 0)) * torch_dtype(self.dtype).itemsize


class CacheRecord(RecordPart):
    """The content of cache.json.

    fingerprint: what training compares, by name. source_*: the dataset when the cache was made. image_shards,
    prompt_shards: names inside the folder; the tables refer to a shard by its position in these lists.
    """

    format: int = FORMAT_VERSION
    fingerprint: dict[str, str]
    source_description: str
    source_counts: dict[str, int]
    source_fingerprint: dict[str, str]
    software: dict[str, str]
    num_pairs: int
    num_bad_pairs: int
    num_images: int
    num_bad_images: int
    num_prompts: int
    bucket_sizes: list[int]
    bucket_shapes: list[tuple[int, int]]
    images: StoredImages
    text: StoredText
    image_shards: list[str]
    prompt_shards: list[str]
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def only_files_of_the_cache_are_named(self) -> CacheRecord:
        # a record is an untrusted file too: it must not lead the reader out of its folder
        outside = [name for name in self.files if leads_outside(name)]
        unlisted = [name for name in (*self.image_shards, *self.prompt_shards) if name not in self.files]
        if outside or unlisted:
            raise ValueError(f"{(outside + unlisted)[0]} is not a file of the cache")
        return self


def read_record(folder: Path) -> CacheRecord:
    """Read cache.json. Raises DataError if it does not exist or is not of this version."""
    state = "was not finished: run scripts/cache.py again" if work_of(folder).is_dir() else "is not a cache"
    return read_record_file(folder / RECORD_NAME, CacheRecord, format_version=FORMAT_VERSION, state_without=state)
