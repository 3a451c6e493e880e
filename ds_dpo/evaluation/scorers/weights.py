"""Where the weights of scorers are, and what identifies them: files here or from the hub, hashes, versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ds_dpo.errors import DsDpoError, ScorerError, cut
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.models.weights.hashes import remembered_sha256
from ds_dpo.models.weights.hub import commit_of
from ds_dpo.storage.hub_failures import hub_failure


def find_folder(source: str, *, scorer: str, patterns: Sequence[str]) -> Path:
    """Return a folder here, or the snapshot of a hub id with the files that match. Raises ScorerError."""
    place = Path(source)
    if place.is_dir():
        return place
    _require_hub_id(source, scorer)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # also errors of the HTTP library under the hub's client
        raise _unreachable(scorer, source, error) from error


def find_file(repository: str, name: str, *, scorer: str) -> Path:
    """Return the path of a file of the hub, downloaded unless cached. Raises ScorerError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:
        raise _unreachable(scorer, f"{repository}/{name}", error) from error


def record_of(
    choice: ScorerChoice, *, weights: Iterable[Path], packages: Iterable[str], **facts: object
) -> Mapping[str, object]:
    """Return a scorer's record: its kind and source, versions of packages, SHA-256 and hub commit of weights."""
    paths = list(weights)
    try:
        hashes = {path.name: remembered_sha256(path) for path in paths}
    except DsDpoError as error:
        raise ScorerError(f"scorer {choice.name}: {error}") from error
    commit = next((found for path in paths if (found := commit_of(path)) is not None), None)
    return {
        "kind": choice.kind,
        "source": choice.source,
        **({"commit": commit} if commit else {}),
        "sha256": hashes,
        "versions": {name: _version(name) for name in packages},
        **facts,
    }


def _require_hub_id(source: str, scorer: str) -> None:
    parts = source.split("/")
    if len(parts) != 2 or not all(parts) or source.startswith((".", "~")):
        raise ScorerError(
            f"scorer {scorer}: {cut(source)} is no folder here; give a folder, or a hub id such as owner/name"
        )


def _unreachable(scorer: str, wanted: str, error: Exception) -> ScorerError:
    return ScorerError(
        f"scorer {scorer}: {cut(wanted)} is not here, and the hub does not provide it: {hub_failure(error)}; or "
        f"give a local copy as {scorer}=FOLDER"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
