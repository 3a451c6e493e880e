"""Where the weights of scorers are, and what identifies them: files here or from the hub, hashes, versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ds_dpo.errors import DsDpoError, ScorerError, cut
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.models.weights.hashes import remembered_sha256
from ds_dpo.models.weights.hub import commit_of
from ds_dpo.storage.hub_failures import hub_failure

if TYPE_CHECKING:
    from torch import Tensor


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


def find_file(source: str, names: Sequence[str], *, scorer: str) -> Path:
    """Return a file here, one of these names in a folder here, or the first of them from a hub id.

    Raises ScorerError.
    """
    place = Path(source)
    if place.is_file():
        return place
    if place.is_dir():
        found = next((path for name in names if (path := place / name).is_file()), None)
        if found is None:
            raise ScorerError(f"scorer {scorer}: {place} has none of the files {', '.join(names)}")
        return found
    _require_hub_id(source, scorer)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, names[0]))
    except Exception as error:  # also errors of the HTTP library under the hub's client
        raise _unreachable(scorer, f"{source}/{names[0]}", error) from error


def read_tensors(path: Path, *, scorer: str) -> Mapping[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a pickle of nothing but tensors, which runs no code.

    Tensors may be under the name state_dict. Raises ScorerError for a file that is torn or holds something else.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip files and safetensors raise each their own
        raise ScorerError(
            f"scorer {scorer}: {path} cannot be read as weights alone ({type(error).__name__}: {cut(str(error))}); "
            "download it again"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ScorerError(f"scorer {scorer}: {path} holds something else than tensors by name")
    return content


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
            f"scorer {scorer}: {cut(source)} is neither a file nor a folder here; give one, or a hub id like owner/name"
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
