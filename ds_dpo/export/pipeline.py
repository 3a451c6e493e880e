"""Copy the parts of a base pipeline that training does not change, without loading them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.errors import ModelError
from ds_dpo.export.base_weights import SCHEDULER_CONFIG
from ds_dpo.export.source import BaseModel
from ds_dpo.models.weights.files import index_files, read_header, read_json
from ds_dpo.models.weights.hub import fetch_folder

INDEX_NAME = "model_index.json"
SETTINGS = (".json", ".txt", ".model", ".jinja")  # files of schedulers, tokenizers and models
WEIGHTS = (".safetensors", ".bin")  # the first kind that a component has is copied
WEIGHTS_NAME = re.compile(  # a file of weights or its index, as diffusers and transformers name them
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?(?P<suffix>\.safetensors|\.bin)"
    r"(?:\.index(?:\.(?P<index_variant>[^.]+))?\.json)?"
)
WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")  # ends of their class names


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
    if not path.is_file():
        raise ModelError(f"{path}: cannot be read, so this is not a diffusers pipeline (no such file)")
    found = {}
    for name, entry in read_json(path).items():
        if isinstance(entry, list) and entry[:1] != [None]:
            if len(entry) != 2 or Path(name).name != name or not all(isinstance(part, str) for part in entry):
                raise ModelError(f"{path}: {name} must name a library and a class, such as [diffusers, AutoencoderKL]")
            found[name] = str(entry[1])
    return found


def list_copies(pipeline: Path, *, replaced: str, variant: str | None, vae: Path | None) -> list[tuple[Path, str]]:
    """Return a pipeline's files to copy and their new names: all but the denoiser's, with vae instead of its own VAE.

    replaced: the denoiser's folder. variant: weights of this variant (model.fp16.safetensors), if there are any, are
    copied under the plain name, and else the plain ones; where there are no plain ones, those of fp16 or of the only
    variant. Raises ModelError for a component whose folder or weights are missing, or that needs renamed shards.
    """
    copies = [(pipeline / INDEX_NAME, INDEX_NAME)]
    for component, class_name in components(pipeline).items():
        if component == replaced:
            continue
        folder = vae if component == "vae" and vae is not None else pipeline / component
        if not folder.is_dir():
            raise ModelError(f"{folder}: missing, but {pipeline / INDEX_NAME} names it")
        files = _component_files(folder, variant=variant)
        _require_weights(folder, class_name, [path for path, _ in files])
        copies += [(path, f"{component}/{name}") for path, name in files]
    return copies


def check_complete(pipeline: Path) -> None:
    """Raise ModelError unless each component of a written pipeline has what from_pretrained needs, with whole files."""
    for component, class_name in components(pipeline).items():
        folder = pipeline / component
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        _require_weights(folder, class_name, files)
        for path in files:
            if path.suffix == WEIGHTS[0]:
                read_header(path)
            elif path.name.endswith(".json") and ".index." in path.name:
                index_files(path)


def _require_weights(folder: Path, class_name: str, files: list[Path]) -> None:
    if not files:
        raise ModelError(f"{folder}: has no file of a {class_name}, so the pipeline would be incomplete")
    if not class_name.endswith(WITHOUT_WEIGHTS) and not any(path.suffix in WEIGHTS for path in files):
        raise ModelError(
            f"{folder}: has no weights of its {class_name}, neither {WEIGHTS[0]} nor {WEIGHTS[1]}, so the pipeline "
            "would not load; give a whole pipeline with --base"
        )


def _component_files(folder: Path, *, variant: str | None) -> list[tuple[Path, str]]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    settings = [path for path in files if path.suffix in SETTINGS and ".index." not in path.name]
    for suffix in WEIGHTS:
        weights = _weights_of(files, suffix=suffix, variant=variant)
        if weights:
            break
    return [(path, path.name) for path in settings] + weights


def _weights_of(files: list[Path], *, suffix: str, variant: str | None) -> list[tuple[Path, str]]:
    named = {
        path: match for path in files if (match := WEIGHTS_NAME.fullmatch(path.name)) and match["suffix"] == suffix
    }
    copies = []
    for stem in sorted({match["stem"] for match in named.values()}):
        own = {
            path: match["variant"] or match["index_variant"] for path, match in named.items() if match["stem"] == stem
        }
        chosen = _chosen_variant({name for name in own.values()}, wanted=variant)
        paths = [path for path in own if own[path] == chosen]
        if chosen is not None and len(paths) > 1:
            raise ModelError(
                f"{paths[0]}: sharded weights of a variant cannot be renamed; give a base with plain or single files"
            )
        copies += [(path, path.name if chosen is None else path.name.replace(f".{chosen}", "", 1)) for path in paths]
    return copies


def _chosen_variant(found: set[str | None], *, wanted: str | None) -> str | None:
    """Return the wanted variant if it was found, else the plain weights (None), else fp16, else the first."""
    return next((name for name in (wanted, None, "fp16") if name in found), min(found, key=str))


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
