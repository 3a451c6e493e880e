"""What a cache of encoded pairs is on disk: its files, its tables' columns, and cache.json, which is written last.

    cache.json          CacheRecord: what was encoded with what, and every other file's size and SHA-256
    pairs.npy           PAIR_ROW for each pair, in the source's order
    images.npy          IMAGE_ROW for each distinct image: where its bytes lie
    prompts.npy         PROMPT_ROW for each distinct prompt
    bad_pairs.arrow     uid and reason of each pair that cannot be read
    images/ prompts/    shards, Arrow IPC files; see cache_shards
    work/               only while it is made

A folder without cache.json is no cache.
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
EMPTY_PROMPT_ROW = 0  # '' is the first prompt of every cache, for prompts that are dropped

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
# Offsets are bytes from the start of the shard; -1: not stored. original: upright, pixels. corner: of the crop.
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
    """quantity: what is kept of a posterior. channels: C of the latent. factor: pixels of a latent's side.

    vae_dtype: in which the VAE ran. scaling: what its config says of shift and scale.
    """

    quantity: Quantity
    dtype: Precision
    mirrored: bool
    channels: int
    factor: int
    vae_dtype: Precision
    scaling: dict[str, float | list[float] | None]

    def shape(self, pixels: tuple[int, int]) -> tuple[int, int, int]:
        """Return what is stored of an image of so many pixels: (2C, H, W), or (C, H, W) of the mean alone."""
        channels = self.channels * (2 if self.quantity == "moments" else 1)
        return channels, pixels[0] // self.factor, pixels[1] // self.factor

    def num_bytes(self, pixels: tuple[int, int]) -> int:
        """Return the bytes of one variant of an image."""
        return int(np.prod(self.shape(pixels))) * torch_dtype(self.dtype).itemsize


class StoredText(RecordPart):
    """states_shape: (L, D). pooled_width: P, None for a family without. dtype: that of the text encoders."""

    states_shape: tuple[int, int]
    pooled_width: int | None
    dtype: Precision

    def num_bytes(self) -> int:
        """Return the bytes of one prompt."""
        return (int(np.prod(self.states_shape)) + (self.pooled_width or 0)) * torch_dtype(self.dtype).itemsize


class CacheRecord(RecordPart):
    """The content of cache.json.

    fingerprint: what training compares, by name. source_*: the dataset as it was when the cache was made.
    image_shards, prompt_shards: by their numbers in the tables; names inside the folder.
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
        # a record is an untrusted file too: it must not send the reader outside of its folder
        outside = [name for name in self.files if leads_outside(name)]
        unlisted = [name for name in (*self.image_shards, *self.prompt_shards) if name not in self.files]
        if outside or unlisted:
            raise ValueError(f"{(outside + unlisted)[0]} is no file of the cache")
        return self


def read_record(folder: Path) -> CacheRecord:
    """Read cache.json. Raises DataError where there is none, or it is not one of this version."""
    state = "was not finished: run scripts/cache.py again" if work_of(folder).is_dir() else "is no cache"
    return read_record_file(folder / RECORD_NAME, CacheRecord, format_version=FORMAT_VERSION, state_without=state)
