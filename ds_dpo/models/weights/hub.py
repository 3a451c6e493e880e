"""Get files of models from the Hugging Face hub, with one clear message if they are not available."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from ds_dpo.errors import ModelError
from ds_dpo.storage.hub_failures import hub_failure


@cache  # if a branch changes while a process loads, it must not get parts of two revisions
def fetch_folder(model: str, *, revision: str | None, patterns: Sequence[str], leave_out: Sequence[str] = ()) -> Path:
    """Return the path of a snapshot with the files that match, downloaded unless cached.

    Raises ModelError if they are not available.
    """
    from huggingface_hub import snapshot_download

    with _reachable(model, "its files", revision):
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(leave_out))
        )


def fetch_file(model: str, name: str, *, revision: str | None) -> Path:
    """Return the path of a hub model's file, downloaded unless cached. Raises ModelError if it is not available."""
    from huggingface_hub import hf_hub_download

    with _reachable(model, name, revision):
        return Path(hf_hub_download(model, name, revision=revision))


def commit_of(place: Path) -> str | None:
    """Return the commit of a file or folder in the hub's cache; None for any other place."""
    for folder in (place, *place.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.name
    return None


@contextlib.contextmanager
def _reachable(model: str, wanted: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # also errors of the HTTP library under the hub's client
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{model!r} is not a folder here, and the hub does not provide {wanted}{at}: {hub_failure(error)}; or give "
            "a local diffusers folder"
        ) from error
