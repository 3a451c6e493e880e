"""What determines the content of a cache, as named parts: runs that agree in all parts can train on one cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ds_dpo.config.data import DataConfig
from ds_dpo.config.fields import FIELDS
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import CheckpointError, ConfigError, ModelError
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.loading import tokenizer_of
from ds_dpo.models.pipelines.pretrained import open_pipeline, open_vae
from ds_dpo.models.weights.parts import Part
from ds_dpo.precision import Precision
from ds_dpo.storage.manifest import hash_file
from ds_dpo.storage.replace import replace_file

# fields of data that act when a cached pair is read; all other identity fields of data are compared
ACT_ON_READING = {"flip", "size_conditioning", "prompt_dropout"}


def fingerprint_of(config: RunConfig, *, text_dtype: Precision) -> dict[str, str]:
    """Return what a cache for this run must be made from. Models enter by the content of their files, not by name.

    text_dtype: precision of the text encoders, which is the run's. Raises ModelError if a model is missing, and
    ConfigError for data.crop random.
    """
    _require_one_crop(config.data)
    return {**data_fields(config.data, leave_out=ACT_ON_READING), **encoder_parts(config, text_dtype=text_dtype)}


def encoder_parts(config: RunConfig, *, text_dtype: Precision) -> dict[str, str]:
    """Return the parts that determine how images and prompts are encoded. Raises ModelError if a model is missing."""
    model = config.model
    pipeline = open_pipeline(model)
    parts: dict[str, str] = {}
    parts["model.family"] = model.family
    parts["model.vae_dtype"] = model.vae_dtype
    parts["vae"] = _content_of_model(open_vae(model))
    for name in FAMILIES[model.family].text_encoders:
        parts[name] = _content_of_model(pipeline.text_encoder(name))
        tokenizer = tokenizer_of(name)
        parts[tokenizer] = _content_of_files(pipeline.tokenizer_files(tokenizer))
    parts["text_dtype"] = text_dtype
    return parts


def _require_one_crop(data: DataConfig) -> None:
    if data.crop == "random":
        raise ConfigError("data.crop random does not fit a cache, which holds one cut of each image; use center")


def data_fields(data: DataConfig, *, leave_out: Collection[str] = ()) -> dict[str, str]:
    """Return the identity fields of data, by dotted name: a run cannot change them."""
    values = data.model_dump(mode="json")
    names = [spec.path.removeprefix("data.") for spec in FIELDS.values() if spec.section == "data" and spec.is_identity]
    return {f"data.{name}": json.dumps(values[name]) for name in names if name not in leave_out}


def _content_of_model(part: Part) -> str:
    # names that begin with _ hold the library's version and the path where the model was saved
    config = {name: value for name, value in part.config.items() if not name.startswith("_")}
    digests = [remembered_sha256(path) for path in part.files.paths]  # for a whole checkpoint, the hash of all of it
    return hashlib.sha256("\n".join([json.dumps(config, sort_keys=True), *digests]).encode()).hexdigest()


def _content_of_files(files: Sequence[Path]) -> str:
    lines = [f"{path.name} {remembered_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def remembered_sha256(path: Path) -> str:
    """Return a file's SHA-256; a file is hashed again only if its path, size or time of change differs.

    Hashes are kept in $XDG_CACHE_HOME/ds_dpo, by default ~/.cache/ds_dpo, because reading a text encoder takes seconds.
    Raises ModelError if the file cannot be read.
    """
    real = path.resolve()
    state = real.stat()
    key = hashlib.sha256(f"{real}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()[:40]
    note = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_dpo" / "sha256" / key
    if note.is_file() and len(found := note.read_text(encoding="ascii").strip()) == 64:
        return found
    try:
        digest = hash_file(real).sha256
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    _remember(note, digest)
    return digest


def _remember(note: Path, digest: str) -> None:
    # on some clusters the home folder cannot be written: then files are hashed again each time, which takes seconds
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, digest + "\n", sync=False)
