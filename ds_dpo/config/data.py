"""The run configuration's section on preference pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, free_field, identity_field


class DataConfig(Section):
    """Preference pairs: where they are, which of them count, and how their images are cut."""

    dataset: str = identity_field("hub id, local folder or file, or ds_dpo://assets/...")
    name: str | None = identity_field("configuration (subset) of a hub dataset; none: its only one", default=None)
    revision: str | None = identity_field("commit or branch of a hub dataset; none: its default branch", default=None)
    split: str = identity_field("split of the dataset", default="train")
    cache_dir: str | None = free_field("where `datasets` keeps its files; none: its own default", default=None)
    format: Literal["pickapic", "chosen_rejected", "ranked", "manifest", "webdataset"] = identity_field(
        "how a row tells its pairs; docs/data.md describes each", default="pickapic"
    )
    columns: list[str] = identity_field(
        "role=column for each column that is not named as the format expects, such as prompt=text", default=[]
    )
    image_root: str | None = free_field(
        "folder that the image paths of a manifest start from; none: the manifest's own", default=None
    )
    cache: str | None = free_field(
        "folder of scripts/cache.py with these pairs encoded; none: images and prompts are encoded as they come",
        default=None,
    )
    ties: Literal["drop", "soft", "error"] = identity_field(
        "pairs that nobody won: left out, trained towards equality (target 0.5), or refused", default="drop"
    )
    confidence: Literal["ignore", "target", "weight"] = identity_field(
        "what a pair's confidence, where there is one, is used for: nothing, its target probability, its weight",
        default="ignore",
    )
    min_confidence: float | None = identity_field(
        "leave out pairs of less confidence; pairs without one stay; none: keep all", default=None, ge=0, le=1
    )
    models: list[str] = identity_field(
        "keep pairs whose images both come from a model with one of these in its name (the paper's subset: dreamlike)",
        default=[],
    )
    has_label: Literal["ignore", "require"] = identity_field(
        "require: keep only rows that say has_label", default="ignore"
    )
    max_pairs_per_prompt: int | None = identity_field(
        "keep the first so many pairs of a prompt; none: all", default=None, ge=1
    )
    max_rows: int | None = identity_field("read the first so many rows only; none: all", default=None, ge=1)
    expected_pairs: int | None = free_field(
        "pairs that should be left; another number is warned of; none: not checked", default=None, ge=1
    )
    resolution: int = identity_field("side of the square training images, pixels", default=1024, ge=16, multiple_of=8)
    aspect_buckets: bool = identity_field(
        "train at several aspect ratios of about resolution x resolution pixels; all pairs of a step share one",
        default=False,
    )
    bucket_step: int = identity_field("sides of buckets are multiples of this, pixels", default=64, ge=8, multiple_of=8)
    max_aspect: float = identity_field("longer side of the most extreme bucket over its shorter one", default=2.0, ge=1)
    crop: Literal["center", "random"] = identity_field("one crop for both images of a pair", default="center")
    flip: Literal["off", "shared", "independent"] = identity_field(
        "mirror half of the pairs (shared) or half of the images (independent, as the authors' code)", default="off"
    )
    size_conditioning: Literal["fixed", "true"] = identity_field(
        "sizes told to SDXL: always the training size (fixed, as the authors) or the file's own (true)", default="fixed"
    )
    prompt_dropout: float = identity_field("share of pairs whose prompt becomes ''", default=0.0, ge=0, le=1)
    max_bad_rows: int = free_field(
        "unreadable rows that are named and replaced, over the run, before it is an error", default=100, ge=0
    )
    workers: int = free_field("loader processes of a rank; 0: in the training process", default=4, ge=0)
    prefetch: int = free_field("micro-batches that each loader process has ready", default=2, ge=1)

    @model_validator(mode="after")
    def a_cache_holds_one_crop(self) -> DataConfig:
        if self.cache is not None and self.crop == "random":
            raise ValueError("data.cache holds each image cut once: data.crop random does not fit; take center")
        return self
