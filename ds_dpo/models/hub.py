"""Files of models on the Hugging Face hub; one clear message where there is no network and no cached copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ds_dpo.errors import ModelError


@cache  # a branch that moves while a process loads must not give it parts of two revisions
def fetch_folder(model: str, *, revision: str | None, patterns: Sequence[str]) -> Path:
    """Path of a snapshot holding the files that match, downloaded unless cached.

    Raises ModelError where they cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # also those of whatever HTTP library the hub's client is built on
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{model!r} is no folder here, and its files{at} could not be had from the hub ({type(error).__name__}); "
            "name a local diffusers folder, or go where the hub can be reached"
        ) from error
