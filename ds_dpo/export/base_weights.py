"""The weights and settings of the model that a run started from, if they are available."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.export.source import BaseModel
from ds_dpo.models.weights.files import DIFFUSERS_STEM, FileWeights, find_weights, read_json
from ds_dpo.models.weights.hub import fetch_folder

if TYPE_CHECKING:
    from ds_dpo.models.pipelines.single_file import SingleFile

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def weights_at_hand(base: BaseModel | None) -> Mapping[str, Tensor] | None:
    """Return the base's denoiser weights if this machine has them in a folder, a file or the hub's cache; else None."""
    if base is None:
        return None
    if Path(base.name).is_file():
        return _in_file(base).denoiser().weights()
    folder: Path | None = Path(base.name)
    if folder is not None and not folder.is_dir():
        config = _cached(base, f"{base.denoiser.folder}/config.json")
        folder = None if config is None else config.parent.parent
    try:
        return None if folder is None else _in_folder(folder, base)
    except ModelError:  # a folder may hold only settings, and the hub's cache any part of a model
        return None


def required_weights(base: BaseModel | None, *, why: str) -> Mapping[str, Tensor]:
    """Return the base's denoiser weights; downloads them if the base is a hub id that is not in the cache.

    why: what needs them. Raises ConfigError if no base is known, ModelError if it cannot be read.
    """
    if base is None:
        raise ConfigError(
            f"{why} needs the base's weights, but the checkpoint does not name its base; add --base MODEL"
        )
    found = weights_at_hand(base)
    if found is not None or Path(base.name).is_dir():
        return found or _in_folder(Path(base.name), base)
    infix = f".{base.variant}" if base.variant else ""
    inside = base.denoiser.folder
    patterns = (f"{inside}/config.json", f"{inside}/{DIFFUSERS_STEM}*{infix}*.safetensors*")
    return _in_folder(fetch_folder(base.name, revision=base.revision, patterns=patterns), base)


def scheduler_of(base: BaseModel | None) -> dict[str, Any] | None:
    """Return the scheduler configuration that the run trained with: the base's own, with the run's changes.

    None if the base's own is not available and the run changes no prediction type.
    """
    if base is None:
        return None
    own = _own_scheduler(base)
    if own is None and "prediction_type" not in base.scheduler:
        return None
    return {**(own or {}), **base.scheduler}


def prediction_type_of(base: BaseModel | None) -> str | None:
    """Return what the model predicts, in diffusers' words, from the run or the base; None if it is not available."""
    found = (scheduler_of(base) or {}).get("prediction_type")
    return None if found is None else str(found)


def _own_scheduler(base: BaseModel) -> dict[str, Any] | None:
    folder = Path(base.name)
    if folder.is_file():
        try:
            return dict(_in_file(base).scheduler_config(base.scheduler.get("prediction_type")))
        except ModelError:  # a file may not state its prediction type
            return None
    path = folder / SCHEDULER_CONFIG if folder.is_dir() else _cached(base, SCHEDULER_CONFIG)
    return read_json(path) if path is not None and path.is_file() else None


def _in_file(base: BaseModel) -> SingleFile:
    from ds_dpo.models.pipelines.single_file import SingleFile  # imports diffusers, which takes seconds

    return SingleFile(Path(base.name))


def _in_folder(folder: Path, base: BaseModel) -> FileWeights:
    inside = folder / base.denoiser.folder
    denoiser = inside if inside.is_dir() else folder
    if base.variant is not None:
        return FileWeights(find_weights(denoiser, DIFFUSERS_STEM, variant=base.variant))
    try:
        return FileWeights(find_weights(denoiser, DIFFUSERS_STEM, variant=None))
    except ModelError:
        # a base that the user names may have only fp16 weights
        if not any(denoiser.glob(f"{DIFFUSERS_STEM}*fp16*")):
            raise
        return FileWeights(find_weights(denoiser, DIFFUSERS_STEM, variant="fp16"))


def _cached(base: BaseModel, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base.name, name, revision=base.revision)
    except HFValidationError:  # a path of another machine is not the name of a repository
        return None
    return Path(found) if isinstance(found, str) else None
