"""How held-out pairs are read, and the check of local data sets that needs no pair."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_dpo.config.asset_paths import is_local
from ds_dpo.config.data import DataConfig
from ds_dpo.config.run import RunConfig
from ds_dpo.data.reading.labels_file import content_of_labels
from ds_dpo.data.reading.split_files import find_split
from ds_dpo.errors import DataError


def held_out_data(config: RunConfig) -> DataConfig:
    """Return how held-out pairs are read and cut: like those that are trained on, without ties and without chance."""
    data, held_out = config.data, config.held_out
    changes: dict[str, Any] = {
        "split": held_out.split or data.split,
        "cache": None,
        "ties": "drop",  # a tie has no preferred image
        "confidence": "ignore",
        "expected_pairs": None,
        "crop": "center",
        "flip": "off",
        "prompt_dropout": 0.0,
    }
    if held_out.share is None:
        changes["max_rows"] = None
    if held_out.dataset or held_out.name or held_out.split:
        changes |= {"files": [], "labels": None}  # of those that are trained on
    if held_out.dataset is not None:
        changes |= {"dataset": held_out.dataset, "name": held_out.name, "revision": None, "image_root": None}
    elif held_out.name is not None:
        changes["name"] = held_out.name
    if held_out.format not in (None, data.format):
        changes |= {"format": held_out.format, "columns": []}
    if held_out.columns:
        changes["columns"] = held_out.columns
    return data.model_copy(update=changes)


def require_local_splits(config: RunConfig) -> None:
    """Raise DataError if a local data set lacks the split that is trained on, or the one that is held out.

    So does a file of labels that is missing.
    Only names of files are looked at; a data set of the hub, or one that is not on this machine, passes.
    """
    if config.data.labels is not None:
        content_of_labels(Path(config.data.labels))
    if config.data.cache is None and is_local(config.data.dataset):
        find_split(config.data)
    held_out = held_out_data(config)
    is_divided = config.held_out.share is not None
    if config.held_out.every_steps is not None and not is_divided and is_local(held_out.dataset):
        with named_as_held_out(config):
            find_split(held_out)


@contextmanager
def named_as_held_out(config: RunConfig) -> Iterator[None]:
    """Let a DataError of the body name the fields of held_out that are set, in place of data's."""
    try:
        yield
    except DataError as error:
        raise DataError(_with_names_of_held_out(str(error), config)) from error


def _with_names_of_held_out(message: str, config: RunConfig) -> str:
    split, share = config.held_out.split, config.held_out.share
    given = [name for name in ("dataset", "name", "split", "format", "columns") if getattr(config.held_out, name)]
    renamed = re.sub(rf"\bdata\.({'|'.join(given)})\b", r"held_out.\1", message) if given else message
    if split is not None and f"has no split {split};" in renamed:
        renamed = renamed.partition("; data.files")[0]  # held-out pairs have no patterns of files
        return f"held_out.split {split}: {renamed}; held_out.share would hold out pairs of data.split"
    if share is not None and renamed.endswith("no pair is left to hold out"):
        return f"held_out.share {share:g}: {renamed}; give a larger share"
    return f"held_out: {renamed}"
