"""What scripts/cache.py is asked to make, where its files are, and what determines their content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.config.run import RunConfig
from ds_dpo.data.source import PairSource
from ds_dpo.encoding.cache.record import IMAGE_SHARDS, PROMPT_SHARDS, Quantity, StoredImages
from ds_dpo.making.folder import work_of
from ds_dpo.making.make import Units
from ds_dpo.models.loading import latent_shape
from ds_dpo.models.pipelines.latent_scaling import latent_scaling
from ds_dpo.models.pipelines.pretrained import open_vae
from ds_dpo.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Request:
    """What scripts/cache.py was asked to make.

    quantity: "moments", from which a run still draws its latents, or "mean" of the posterior alone. dtype: precision
    of the stored images. shard_pairs: pairs in a unit, which is encoded as a whole. images_at_once: images in a pass
    of the VAE; None takes the number of online training.
    """

    config: RunConfig
    text_dtype: Precision
    out: Path
    quantity: Quantity
    dtype: Precision
    mirrored: bool
    shard_pairs: int
    images_at_once: int | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The paths of a cache's files, and of the files that exist only while it is made."""

    out: Path
    units: Units

    @property
    def work(self) -> Path:
        return work_of(self.out)

    def scan(self, unit: int) -> Path:
        return self.work / f"scan-{unit:05d}.arrow"

    def images(self, unit: int) -> Path:
        return self.out / IMAGE_SHARDS / f"{unit:05d}.arrow"

    def prompts(self, unit: int) -> Path:
        return self.out / PROMPT_SHARDS / f"{unit:05d}.arrow"

    def unscanned(self) -> list[int]:
        return self.units.missing(lambda unit: [self.scan(unit)])

    def unencoded(self) -> list[int]:
        return self.units.missing(lambda unit: [self.prompts(unit), self.images(unit)])


def stored_images(request: Request, source: PairSource) -> StoredImages:
    """Return what is stored of each image, from the VAE's config alone. Raises ModelError if a bucket does not fit."""
    model = request.config.model
    shapes = [latent_shape(model, shape) for shape in source.bucket_shapes]
    return StoredImages(
        quantity=request.quantity,
        dtype=request.dtype,
        mirrored=request.mirrored,
        channels=shapes[0][0],
        factor=source.bucket_shapes[0][0] // shapes[0][1],
        vae_dtype=model.vae_dtype,
        scaling=latent_scaling(open_vae(model)),
    )


def plan_of(
    request: Request, *, fingerprint: Mapping[str, str], source: Mapping[str, str], num_pairs: int, images: StoredImages
) -> dict[str, Any]:
    """Return everything that determines the content of a shard, except the number of images in a pass of the VAE."""
    return {
        "fingerprint": dict(fingerprint),
        "source": dict(source),
        "num_pairs": num_pairs,
        "images": images.model_dump(mode="json"),
        "shard_pairs": request.shard_pairs,
    }
