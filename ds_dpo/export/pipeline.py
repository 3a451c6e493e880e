"""Copy the parts of a base pipeline that training does not change, without loading them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.errors import ModelError
from ds_dpo.export.base_weights import SCHEDULER_CONFIG
from ds_dpo.export.source import BaseModel
from ds_dpo.models.weights.files import read_json
from ds_dpo.models.weights.hub import fetch_folder

INDEX_NAME = "model_index.json"
SETTINGS = (".json", ".txt", ".model", ".jinja")  # files of schedulers, tokenizers and models
WEIGHTS = (".safetensors", ".bin")  # the first kind that a component has is copied


def locate_pipeline(base: BaseModel, *, replaced: str) -> Path:
    """Return the folder of the base pipeline; a hub id is downloaded without its denoiser's weights.

    replaced: the denoiser's folder. Raises ModelError if the base cannot be read, or is not a diffusers pipeline with
    that folder.
    """
    folder = Path(base.name)
    if folder.is_file():
        raise ModelError(
            f"--format pipeline: the base {folder} is one file; --format single-file --base_file {folder} writes "
            "another such file, or give a diffusers folder of the same model with --base"
        )
    if not folder.is_dir():
        patterns = [INDEX_NAME, *(f"*/*{suffix}" for suffix in (*SETTINGS, WEIGHTS[0]))]
        folder = fetch_folder(base.name, revision=base.revision, patterns=tuple(patterns), leave_out=(f"{replaced}/*",))
    if replaced not in components(folder):
        raise ModelError(f"{folder / INDEX_NAME}: has no {replaced!r}, so that this model does not fit into it")
    return folder


def locate_vae(name: str) -> Path:
    """Return the folder with config.json and weights of a VAE: that folder, its subfolder vae, or a hub model's.

    Raises ModelError if there is none.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = fetch_folder(name, revision=None, patterns=("config.json", "*.safetensors"), leave_out=("*/*",))
    for candidate in (folder, folder / "vae"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ModelError(f"{folder}: not a VAE of diffusers, since it has neither config.json nor vae/config.json")


def components(pipeline: Path) -> dict[str, str]:
    """Return components of a pipeline folder and their classes from model_index.json, without absent ones.

    Raises ModelError if there is no such file.
    """
    path = pipeline / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read, so this is not a diffusers pipeline ({error})") from error
    return {name: str(entry[1]) for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}


def list_copies(pipeline: Path, *, replaced: str, variant: str | None, vae: Path | None) -> list[tuple[Path, str]]:
    """Return a pipeline's files to copy and their new names: all but the denoiser's, with vae instead of its own VAE.

    replaced: the denoiser's folder. variant: weights of this variant (model.fp16.safetensors), if there are any, are
    copied under the plain name. Raises ModelError for a component whose folder is missing or that needs renamed shards.
    """
    copies = [(pipeline / INDEX_NAME, INDEX_NAME)]
    for component in components(pipeline):
        if component == replaced:
            continue
        folder = vae if component == "vae" and vae is not None else pipeline / component
        if not folder.is_dir():
            raise ModelError(f"{folder}: missing, but {pipeline / INDEX_NAME} names it")
        copies += [(path, f"{component}/{name}") for path, name in _component_files(folder, variant=variant)]
    return copies


def _component_files(folder: Path, *, variant: str | None) -> list[tuple[Path, str]]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    settings = [path for path in files if path.suffix in SETTINGS and not path.name.endswith(".index.json")]
    for suffix in WEIGHTS:
        weights = _weights_of(files, suffix=suffix, variant=variant)
        if weights:
            break
    return [(path, path.name) for path in settings] + weights


def _weights_of(files: list[Path], *, suffix: str, variant: str | None) -> list[tuple[Path, str]]:
    weights = [path for path in files if path.suffix == suffix or path.name.endswith(f"{suffix}.index.json")]
    of_variant = [path for path in weights if variant is not None and f".{variant}" in path.name]
    if len(of_variant) > 1:
        raise ModelError(f"{of_variant[0]}: sharded weights of a variant cannot be renamed; use the plain variant")
    if of_variant:
        return [(of_variant[0], of_variant[0].name.replace(f".{variant}", "", 1))]
    # model.safetensors, or shards with their index; never model.fp16.safetensors
    plain = [path for path in weights if "." not in path.name.removesuffix(".index.json").removesuffix(suffix)]
    return [(path, path.name) for path in plain]


def copy_files(copies: list[tuple[Path, str]], folder: Path) -> None:
    """Copy files into a folder under their new names."""
    for path, name in copies:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def state_scheduler(pipeline: Path, settings: Mapping[str, Any]) -> None:
    """Let a pipeline's scheduler config say what its model was trained with, where the base's says otherwise."""
    if settings:
        path = pipeline / SCHEDULER_CONFIG
        path.write_text(json.dumps({**read_json(path), **settings}, indent=2) + "\n", encoding="utf-8")
