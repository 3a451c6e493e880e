"""The section on preference pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from ds_dpo.config.base import PathText, Section, free_field, identity_field
from ds_dpo.errors import ConfigError

FormatName = Literal["pickapic", "chosen_rejected", "ranked", "manifest", "webdataset"]


class DataConfig(Section):
    """Preference pairs: where they come from, which of them are used, and how their images are cut."""

    dataset: PathText = identity_field("Preference pairs: hub id, local folder or file, or ds_dpo://assets/...")
    name: str | None = identity_field("Configuration (subset) of a hub dataset (its only one if unset).", default=None)
    revision: str | None = identity_field(
        "Commit or branch of a hub dataset (its default branch if unset).", default=None
    )
    split: str = identity_field("Split of the dataset.", default="train")
    files: list[str] = identity_field(
        "Patterns of the files that form the split, below the folder or in the hub dataset, such as part-*.parquet or "
        "data/**/*.parquet (if unset, the names of files say their split).",
        default=[],
    )
    cache_dir: PathText | None = free_field(
        "Folder of downloads, of the copy that training makes of parquet, and of indices of pairs (that of the "
        "`datasets` library if unset).",
        default=None,
    )
    format: FormatName = identity_field(
        "How a row states its pairs; docs/data.md describes each format.", default="pickapic"
    )
    columns: list[str] = identity_field(
        "ROLE=COLUMN for each column whose name is not the one that the format expects, such as prompt=text.",
        default=[],
    )
    image_root: PathText | None = free_field(
        "Folder that the image paths in a dataset start from (the dataset's own folder if unset).", default=None
    )
    cache: PathText | None = free_field(
        "Folder of encoded pairs made by scripts/cache.py. If unset, images and prompts are encoded during training.",
        default=None,
    )
    labels: PathText | None = identity_field(
        "File of labels made by scripts/relabel.py. Its verdicts replace the dataset's, its probabilities replace the "
        "dataset's confidence, and pairs without a label are left out (off if unset).",
        default=None,
    )
    ties: Literal["drop", "soft", "error"] = identity_field(
        "What to do with pairs without a winner. drop: leave them out. soft: train towards equality (target 0.5). "
        "error: refuse the dataset.",
        default="drop",
    )
    confidence: Literal["ignore", "target", "weight"] = identity_field(
        "How to use a pair's confidence, if it has one. ignore: not at all. target: as the probability that the "
        "preferred image wins. weight: as the weight of the pair's loss.",
        default="ignore",
    )
    min_confidence: float | None = identity_field(
        "Leave out pairs whose confidence is lower; pairs without a confidence stay (off if unset).",
        default=None,
        ge=0,
        le=1,
    )
    models: list[str] = identity_field(
        "Keep only pairs whose images both come from models with one of these strings in their names, such as "
        "dreamlike for the paper's subset (no strings: keep all pairs).",
        default=[],
    )
    has_label: Literal["ignore", "require"] = identity_field(
        "With require: keep only rows whose has_label is true.", default="ignore"
    )
    max_pairs_per_prompt: int | None = identity_field(
        "Keep only the first N pairs of each prompt (all if unset).", default=None, ge=1
    )
    max_rows: int | None = identity_field("Read only the first N rows (all if unset).", default=None, ge=1)
    expected_pairs: int | None = free_field(
        "Number of pairs expected after filtering; a different number prints a warning (not checked if unset).",
        default=None,
        ge=1,
    )
    resolution: int = identity_field(
        "Side of the square training images in pixels.", default=1024, ge=16, multiple_of=8
    )
    aspect_buckets: bool = identity_field(
        "Train at several aspect ratios, each with about resolution x resolution pixels. All pairs of a step have the "
        "same size.",
        default=False,
    )
    bucket_step: int = identity_field(
        "With aspect_buckets: the sides of each size are multiples of N pixels.", default=64, ge=8, multiple_of=8
    )
    max_aspect: float = identity_field(
        "With aspect_buckets: largest ratio of the longer to the shorter side.", default=2.0, ge=1
    )
    crop: Literal["center", "random"] = identity_field(
        "Part of an image that is kept; it is the same for both images of a pair.", default="center"
    )
    flip: Literal["off", "shared", "independent"] = identity_field(
        "Mirror images with probability 1/2. shared: both images of a pair or neither. independent: each image by "
        "itself, as in the authors' code.",
        default="off",
    )
    size_conditioning: Literal["fixed", "true"] = identity_field(
        "Sizes on which SDXL is conditioned. fixed: always the training size, as in the authors' code. true: each "
        "image's own size and crop.",
        default="fixed",
    )
    prompt_dropout: float = identity_field(
        "Probability with which a pair's prompt is replaced by the empty prompt.", default=0.0, ge=0, le=1
    )
    max_bad_rows: int = free_field(
        "Unreadable rows are reported and replaced; more than N of them since the start end the run.",
        default=100,
        ge=0,
    )
    workers: int = free_field(
        "Number of loader processes of each rank (0: load in the training process).", default=4, ge=0
    )
    prefetch: int = free_field("Number of micro-batches that each loader process prepares ahead.", default=2, ge=1)

    @field_validator("split")
    @classmethod
    def a_split_is_whole(cls, split: str) -> str:
        try:
            refuse_slice(split)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return split

    @model_validator(mode="after")
    def a_cache_holds_one_crop(self) -> DataConfig:
        if self.cache is not None and self.crop == "random":
            raise ValueError(
                "data.crop random does not work with data.cache, which holds one crop of each image; set data.crop to "
                "center"
            )
        return self


def refuse_slice(split: str) -> None:
    """Raise ConfigError for a split in the notation of `datasets` for a part of one."""
    if not split or "[" in split or "]" in split:
        whole = split.partition("[")[0] or "train"
        raise ConfigError(
            f"split {split!r} is not the name of a whole split; {whole} would fit, with data.max_rows N to read only "
            "its first N rows"
        )
