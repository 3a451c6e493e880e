"""What determines the content of a cache, as named parts: runs that agree in all parts can train on one cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from ds_dpo.config.data import DataConfig
from ds_dpo.config.fields import FIELDS
from ds_dpo.config.run import RunConfig
from ds_dpo.data.reading.labels_file import content_of_labels
from ds_dpo.errors import ConfigError
from ds_dpo.models.pipelines.pretrained import open_pipeline, open_vae, tokenizer_of
from ds_dpo.models.weights.hashes import remembered_sha256
from ds_dpo.models.weights.parts import Part
from ds_dpo.precision import Precision

# fields of data that act when a cached pair is read; all other identity fields of data are compared
ACT_ON_READING = {"flip", "size_conditioning", "prompt_dropout"}
# caches that were made before these fields existed have none of them
LEFT_OUT_WHILE_UNSET = {"files", "labels"}


def fingerprint_of(config: RunConfig, *, text_dtype: Precision) -> dict[str, str]:
    """Return what a cache for this run must be made from. Models enter by the content of their files, not by name.

    text_dtype: precision of the text encoders, which is the run's. Raises ModelError if a model is missing, and
    ConfigError for data.crop random.
    """
    _require_one_crop(config.data)
    return {**pair_fields(config, leave_out=ACT_ON_READING), **encoder_parts(config, text_dtype=text_dtype)}


def encoder_parts(config: RunConfig, *, text_dtype: Precision) -> dict[str, str]:
    """Return the parts that determine how images and prompts are encoded. Raises ModelError if a model is missing."""
    model = config.model
    pipeline = open_pipeline(model)
    parts: dict[str, str] = {}
    parts["model.family"] = model.family
    parts["model.vae_dtype"] = model.vae_dtype
    parts["vae"] = _content_of_model(open_vae(model))
    for name in pipeline.text_encoders():
        parts[name] = _content_of_model(pipeline.text_encoder(name))
        tokenizer = tokenizer_of(name)
        parts[tokenizer] = _content_of_files(pipeline.tokenizer_files(tokenizer))
    parts["text_dtype"] = text_dtype
    return parts


def _require_one_crop(data: DataConfig) -> None:
    if data.crop == "random":
        raise ConfigError("data.crop random does not fit a cache, which holds one cut of each image; use center")


def pair_fields(config: RunConfig, *, leave_out: Collection[str] = ()) -> dict[str, str]:
    """Return the fields that decide which pairs are trained on and how, by dotted name: a run cannot change them."""
    values = config.data.model_dump(mode="json")
    names = [spec.path.removeprefix("data.") for spec in FIELDS.values() if spec.section == "data" and spec.is_identity]
    unset = {name for name in LEFT_OUT_WHILE_UNSET if not values[name]}
    fields = {f"data.{name}": json.dumps(values[name]) for name in names if name not in {*leave_out, *unset}}
    if config.data.labels is not None:
        fields["data.labels"] = content_of_labels(Path(config.data.labels))
    share = config.held_out.share
    return fields if share is None else {**fields, "held_out.share": json.dumps(share)}


def _content_of_model(part: Part) -> str:
    # names that begin with _ hold the library's version and the path where the model was saved
    config = {name: value for name, value in part.config.items() if not name.startswith("_")}
    digests = [remembered_sha256(path) for path in part.files.paths]  # for a whole checkpoint, the hash of all of it
    return hashlib.sha256("\n".join([json.dumps(config, sort_keys=True), *digests]).encode()).hexdigest()


def _content_of_files(files: Sequence[Path]) -> str:
    lines = [f"{path.name} {remembered_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
