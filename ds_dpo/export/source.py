"""Find the checkpoint that a path means, and what its run says about the model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.documents import read_yaml
from ds_dpo.config.families import DEFAULT_FAMILY
from ds_dpo.errors import CheckpointError, ModelError, shown
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.families.table import FAMILIES, KINDS, kind_of
from ds_dpo.models.weights.files import read_json
from ds_dpo.process.say import Say
from ds_dpo.storage.best_mark import BEST, Best, read_best_mark
from ds_dpo.storage.manifest import (
    DENOISER_CONFIG_NAME,
    FIRST_DENOISER_CONFIG_NAME,
    MANIFEST_NAME,
    NAME_BYTES,
    checkpoint_folders,
    newest_valid_checkpoint,
    step_folder_name,
    step_of,
    tag_in,
    verify_manifest,
)
from ds_dpo.zero_shards.files import is_tag_folder


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint folder whose manifest, if it has one, was verified. run: the run folder around it, if any."""

    folder: Path
    run: Path | None
    is_verified: bool


def find_source(path: Path, *, step: int | Best | None, say: Say = print) -> Source:
    """Choose the checkpoint that path means: a run folder, its checkpoints, a DeepSpeed save_dir, or a checkpoint.

    Of several checkpoints it is that of step, the one that is marked as the best, or else the newest whose manifest
    verifies. A folder that this project did not write has no manifest and is read unverified. Raises CheckpointError
    that says what was found instead.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder or a checkpoint folder")
    if is_tag_folder(path):
        if step is not None:
            raise CheckpointError(f"{path}: is already one checkpoint; --step needs a run folder")
        return _verified(path)
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step == BEST:
        mark = read_best_mark(checkpoints)
        say(f"the best checkpoint by {mark.metric} is that of step {mark.step}: {mark.value:.4g}")
        step = mark.step
    if checkpoint_folders(checkpoints):
        return _of_run(checkpoints, step=step, say=say)
    return _of_save_dir(checkpoints, step=step)


def _of_run(checkpoints: Path, *, step: int | None, say: Say) -> Source:
    if step is not None:
        folder = checkpoints / step_folder_name(step)
        if not folder.is_dir():
            steps = sorted(step_of(folder) or 0 for folder in checkpoint_folders(checkpoints))
            raise CheckpointError(f"{checkpoints}: has no checkpoint of step {step}, only of {steps}")
        return _verified(folder)
    newest, reasons = newest_valid_checkpoint(checkpoints)
    for reason in reasons:
        say(f"skipped: {reason}")
    if newest is None:
        raise CheckpointError(f"{checkpoints}: has no valid checkpoint; the newest: {reasons[0]}")
    return Source(newest, run=_run_around(newest), is_verified=True)


def _of_save_dir(save_dir: Path, *, step: int | None) -> Source:
    latest = save_dir / "latest"
    if not os.path.lexists(latest):
        raise CheckpointError(
            f"{save_dir}: not a run or checkpoint: it has no checkpoints/step_N, no *_model_states.pt and no 'latest'"
        )
    tag = tag_in(latest) if step is None else f"global_step{step}"
    # the tag comes from a file, so it may only name a folder in here
    is_name = Path(tag).name == tag != "" and len(tag.encode()) <= NAME_BYTES
    if not is_name or not is_tag_folder(save_dir / tag):
        found = sorted(folder.name for folder in save_dir.iterdir() if folder.is_dir() and is_tag_folder(folder))
        raise CheckpointError(f"{save_dir}: has no checkpoint {shown(tag)}, only {found}")
    return _verified(save_dir / tag)


def _verified(folder: Path) -> Source:
    run = _run_around(folder)
    is_ours = (folder / MANIFEST_NAME).exists() or (run is not None and step_of(folder) is not None)
    if is_ours:
        verify_manifest(folder)
    return Source(folder, run=run, is_verified=is_ours)


def _run_around(folder: Path) -> Path | None:
    run = folder.resolve().parent.parent
    return run if folder.resolve().parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The pipeline that a run started from: folder or hub id, with revision, weight variant and the run's VAE.

    scheduler: scheduler settings that the run changed, under diffusers' names. denoiser: its kind.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    denoiser: DenoiserKind = FAMILIES[DEFAULT_FAMILY].denoiser


def base_of_run(run: Path) -> BaseModel:
    """Read the model section of RUN/config.yaml.

    Raises ConfigError if the file cannot be read, CheckpointError if it names no model or an unknown family.
    """
    path = run / "config.yaml"
    config = read_yaml(path, dict, advice="give the base with --base")
    try:
        model = config["model"]
        vae, family = model.get("vae"), model.get("family", DEFAULT_FAMILY)
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise CheckpointError(f"{path}: model.family {family} is none of {known}; give the base with --base")
        return BaseModel(
            resolve_asset(model["pretrained"]),
            model.get("revision"),
            model.get("variant"),
            None if vae is None else resolve_asset(vae),
            _scheduler_of_run(config),
            FAMILIES[family].denoiser,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: has no model.pretrained ({error}); give the base with --base") from error


def _scheduler_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler settings that a sampler of the run's model needs besides the base's own.

    Trailing timesteps begin at the last one, which other spacings leave out. Source: arXiv:2305.08891, section 3.3.
    """
    settings = {}
    if config["model"].get("prediction_type") is not None:
        settings["prediction_type"] = config["model"]["prediction_type"]
    if config.get("diffusion", {}).get("zero_terminal_snr"):
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


def choose_base(source: Source, base: str | None) -> BaseModel | None:
    """Return the base that the user gives, else that of the run, else None."""
    if base is not None:
        return BaseModel(resolve_asset(base), denoiser=_kind_of(source, Path(resolve_asset(base))))
    return None if source.run is None else base_of_run(source.run)


def _kind_of(source: Source, base: Path) -> DenoiserKind:
    """Return the kind of denoiser in a checkpoint, by its saved configuration, else by the folders of its base."""
    saved = _saved_config(source)
    if saved is not None:
        return kind_of(saved)
    found = (kind for kind in KINDS.values() if (base / kind.folder / "config.json").is_file())
    return next(found, FAMILIES[DEFAULT_FAMILY].denoiser)


def _saved_config(source: Source) -> dict[str, Any] | None:
    for name in (DENOISER_CONFIG_NAME, FIRST_DENOISER_CONFIG_NAME):
        if (source.folder / name).is_file():
            return read_json(source.folder / name)
    return None


def denoiser_config(source: Source, base: BaseModel | None) -> dict[str, Any]:
    """Return the denoiser's diffusers configuration: the one saved with the checkpoint, else that of the base.

    Raises CheckpointError if neither is known, and ModelError if the base cannot be read.
    """
    saved = _saved_config(source)
    if saved is not None:
        return saved
    if base is None:
        raise CheckpointError(
            f"{source.folder}: neither {DENOISER_CONFIG_NAME} nor a run's config.yaml describes the model; "
            "give the model that training started from with --base"
        )
    return read_json(_config_of_base(base))


def _config_of_base(base: BaseModel) -> Path:
    folder = Path(base.name)
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is one file, which has no diffusers configuration of its {base.denoiser.title}, and neither has "
            f"the checkpoint ({DENOISER_CONFIG_NAME}); give a diffusers folder with --base"
        )
    inside = f"{base.denoiser.folder}/config.json"
    if not folder.is_dir():
        from ds_dpo.models.weights.hub import fetch_file

        return fetch_file(base.name, inside, revision=base.revision)
    for path in (folder / inside, folder / "config.json"):
        if path.is_file():
            return path
    raise ModelError(f"{folder}: not a diffusers folder, since it has neither {inside} nor config.json")
