"""Files of models on the Hugging Face hub; one clear message where there is no network and no cached copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from ds_dpo.errors import ModelError


@cache  # a branch that moves while a process loads must not give it parts of two revisions
def fetch_folder(model: str, *, revision: str | None, patterns: Sequence[str], leave_out: Sequence[str] = ()) -> Path:
    """Path of a snapshot holding the files that match, downloaded unless cached.

    Raises ModelError if they cannot be had.
    """
    from huggingface_hub import snapshot_download

    with _reachable(model, "its files", revision):
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(leave_out))
        )


def fetch_file(model: str, name: str, *, revision: str | None) -> Path:
    """Path of one file of a hub model, downloaded unless cached. Raises ModelError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    with _reachable(model, name, revision):
        return Path(hf_hub_download(model, name, revision=revision))


@contextlib.contextmanager
def _reachable(model: str, wanted: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # also those of whatever HTTP library the hub's client is built on
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{model!r} is no folder here, and {wanted}{at} could not be had from the hub ({type(error).__name__}); "
            "name a local diffusers folder, or go where the hub can be reached"
        ) from error
