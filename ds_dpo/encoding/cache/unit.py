"""Second pass: encode the images and prompts that occur first in a unit, and write them to its two shards.

Legend: M images; X,Y pixels; C,H,W latent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from ds_dpo.config.models import ModelConfig
from ds_dpo.data.images import cut_image, decode_rgb
from ds_dpo.data.source import BadRowError, PairRecord, PairSource
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns
from ds_dpo.encoding.cache.record import StoredImages, StoredText
from ds_dpo.encoding.cache.scan import SIDES, Buckets, key_of_image, key_of_prompt
from ds_dpo.encoding.cache.shard_file import IMAGE_SCHEMA, PROMPT_SCHEMA, new_shard
from ds_dpo.errors import DataError
from ds_dpo.making.tasks import run_tasks
from ds_dpo.models.families.text import TextEncoder
from ds_dpo.models.loading import load_text, load_vae
from ds_dpo.models.vae import OVERFLOW_ADVICE, PIXELS_AT_ONCE, encode_moments
from ds_dpo.precision import Precision, precision_of_dtype, torch_dtype
from ds_dpo.storage.manifest import FileEntry

PROMPTS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class WantedImage:
    """An image to encode: the index and side of the pair where it occurs first. key: of its content when scanned."""

    index: int
    side: str
    key: bytes


@dataclass(frozen=True, kw_only=True)
class CutVariants:
    """An image cut for encoding, or why it cannot be. variants: (1, 3, X, Y), or (2, 3, X, Y) with the mirrored one."""

    key: bytes
    uid: str
    variants: Tensor | None
    original_size: tuple[int, int] = (0, 0)
    corner: tuple[int, int] = (0, 0)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Cutter:
    source: PairSource
    buckets: Buckets
    mirrored: bool

    def __call__(self, wanted: Sequence[WantedImage]) -> list[CutVariants]:
        return [
            image for index, of_pair in groupby(wanted, lambda one: one.index) for image in self._pair(index, of_pair)
        ]

    def _pair(self, index: int, wanted: Iterator[WantedImage]) -> Iterator[CutVariants]:
        try:
            record = self.source.read(index)
        except BadRowError as error:
            raise DataError(f"{error}; it was readable when it was scanned, so the dataset is being changed") from error
        shape = self.buckets.shapes[self.buckets.of(index)]
        for one in wanted:
            yield self._image(record, one, shape)

    def _image(self, record: PairRecord, wanted: WantedImage, shape: tuple[int, int]) -> CutVariants:
        raw = getattr(record, wanted.side)
        if key_of_image(raw, shape, otherwise=f"{wanted.side} {wanted.index}") != wanted.key:
            raise DataError(
                f"{record.uid}: its {wanted.side} image is not the one that was scanned; the dataset is being changed"
            )
        uid = f"{record.uid} ({wanted.side} image)"
        try:
            image = decode_rgb(raw)
            flips = (False, True) if self.mirrored else (False,)
            cuts = [cut_image(image, size=shape, is_flipped=flip, crop_fractions=None) for flip in flips]
        except DataError as error:
            return CutVariants(key=wanted.key, uid=uid, variants=None, error=str(error))
        return CutVariants(
            key=wanted.key,
            uid=uid,
            variants=torch.stack([cut.pixels for cut in cuts]),
            original_size=cuts[0].original_size,
            corner=cuts[0].corner,  # the crop is central, so mirroring does not move it
        )


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen models on their device, and what of their results is stored."""

    vae: AutoencoderKL
    text: TextEncoder
    device: torch.device
    images: StoredImages
    images_at_once: int | None

    def stored_text(self) -> StoredText:
        """Encode '' to find the shapes of a prompt's states."""
        encoded = self.text.encode([""])
        return StoredText(
            states_shape=(encoded.text_states.shape[1], encoded.text_states.shape[2]),
            pooled_width=None if encoded.pooled is None else encoded.pooled.shape[-1],
            dtype=precision_of_dtype(encoded.text_states.dtype),
        )

    def encode_variants(self, images: Sequence[CutVariants]) -> list[Tensor]:
        """Encode images of one shape, in the stored dtype: (variants, 2C, H, W) each, or (variants, C, H, W) of means.

        Raises DataError that names the images whose moments are not finite or do not fit the stored dtype.
        """
        pixels = torch.cat([image.variants for image in images if image.variants is not None]).to(self.device)
        moments = encode_moments(self.vae, pixels, images_at_once=self.images_at_once)
        if self.images.quantity == "mean":
            moments = moments[:, : self.images.channels]
        stored = moments.to(torch_dtype(self.images.dtype)).cpu()
        per_image = stored.chunk(len(images))
        bad = [image.uid for image, values in zip(images, per_image, strict=True) if not values.isfinite().all()]
        if bad:
            self._refuse(bad, were_finite=bool(moments.isfinite().all()))
        return list(per_image)

    def _refuse(self, uids: Sequence[str], *, were_finite: bool) -> None:
        listed = "\n  ".join(uids)
        if were_finite:
            raise DataError(
                f"latents are too large for --dtype {self.images.dtype}; use bf16 or fp32; the images are:\n  {listed}"
            )
        raise DataError(
            f"the VAE gave NaN or infinite latents in {self.vae.dtype}; {OVERFLOW_ADVICE}; the images are:\n  {listed}"
        )


def load_encoders(
    model: ModelConfig,
    *,
    text_dtype: Precision,
    images: StoredImages,
    images_at_once: int | None,
    place: RankEnvironment,
    device: torch.device,
) -> Encoders:
    """Load the VAE and the text encoders onto the device, one rank of a node after another; every rank calls it."""
    with node_turns(place):
        vae, text = load_vae(model).to(device), load_text(model, dtype=torch_dtype(text_dtype)).to(device)
    return Encoders(vae=vae, text=text, device=device, images=images, images_at_once=images_at_once)


def write_images(
    path: Path,
    wanted: Sequence[WantedImage],
    encoders: Encoders,
    *,
    source: PairSource,
    buckets: Buckets,
    workers: int,
    encoded: Callable[[int], None],
) -> FileEntry:
    """Encode a unit's images into its shard. encoded: called with the number of images after each task.

    Images of a task that have the same shape pass the VAE together; a rerun cuts a unit into the same tasks.
    """
    cut = _Cutter(source=source, buckets=buckets, mirrored=encoders.images.mirrored)
    metadata = {"dtype": encoders.images.dtype, "quantity": encoders.images.quantity}
    with new_shard(path, IMAGE_SCHEMA, metadata=metadata) as shard:
        for images in run_tasks(cut, _tasks(wanted, encoders, buckets), workers=workers):
            for image, variants in zip(images, _encode_by_shape(images, encoders), strict=True):
                shard.rows.add(_image_row(image, variants))
            encoded(len(images))
    return shard.entry


def _tasks(wanted: Sequence[WantedImage], encoders: Encoders, buckets: Buckets) -> list[Sequence[WantedImage]]:
    largest = max(height * width for height, width in buckets.shapes)
    # at least both images of a pair, so that its row is read once
    size = max(2, encoders.images_at_once or PIXELS_AT_ONCE // largest)
    return [wanted[start : start + size] for start in range(0, len(wanted), size)]


def _encode_by_shape(images: Sequence[CutVariants], encoders: Encoders) -> list[Tensor | None]:
    shapes = [None if image.variants is None else image.variants.shape for image in images]
    encoded: list[Tensor | None] = [None] * len(images)
    for shape in dict.fromkeys(shape for shape in shapes if shape is not None):
        places = [place for place, other in enumerate(shapes) if other == shape]
        for place, values in zip(places, encoders.encode_variants([images[place] for place in places]), strict=True):
            encoded[place] = values
    return encoded


def _image_row(image: CutVariants, encoded: Tensor | None) -> Mapping[str, Any]:
    height, width = (0, 0) if image.variants is None else image.variants.shape[-2:]
    return {
        "key": image.key,
        "moments": None if encoded is None else bytes_of(encoded[0]),
        "mirrored": bytes_of(encoded[1]) if encoded is not None and len(encoded) > 1 else None,
        "pixel_height": height,
        "pixel_width": width,
        "original_height": image.original_size[0],
        "original_width": image.original_size[1],
        "corner_top": image.corner[0],
        "corner_left": image.corner[1],
        "error": image.error,
    }


def write_prompts(path: Path, prompts: Sequence[str], encoders: Encoders, stored: StoredText) -> FileEntry:
    """Encode a unit's prompts into its shard. Raises DataError that names a prompt whose states are not finite."""
    metadata = {"dtype": stored.dtype, "text_states_shape": json.dumps(stored.states_shape)}
    with new_shard(path, PROMPT_SCHEMA, metadata=metadata) as shard:
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            part = prompts[start : start + PROMPTS_AT_ONCE]
            encoded = encoders.text.encode(part)
            states, pooled = encoded.text_states.cpu(), None if encoded.pooled is None else encoded.pooled.cpu()
            bad = [prompt for prompt, values in zip(part, states, strict=True) if not values.isfinite().all()]
            if bad:
                raise DataError(
                    f"the text encoders gave NaN or infinite states in {stored.dtype} for prompt {bad[0]!r}"
                )
            for place, prompt in enumerate(part):
                shard.rows.add(
                    {
                        "key": key_of_prompt(prompt),
                        "prompt": prompt,
                        "text_states": bytes_of(states[place]),
                        "pooled": None if pooled is None else bytes_of(pooled[place]),
                    }
                )
    return shard.entry


def bytes_of(values: Tensor) -> bytes:
    """Return a CPU tensor's values as bytes, row by row."""
    content: bytes = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return content


def wanted_of_places(
    places: Sequence[int], *, index_of_pair: NDArray[np.int64], keys: Sequence[bytes]
) -> list[WantedImage]:
    """Return the images at places of a scan: 2 * pair is a chosen image, 2 * pair + 1 a rejected one."""
    return [
        WantedImage(index=int(index_of_pair[place // 2]), side=SIDES[place % 2], key=key)
        for place, key in zip(places, keys, strict=True)
    ]
