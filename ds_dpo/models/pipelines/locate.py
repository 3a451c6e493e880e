"""Where a pipeline, a VAE or a denoiser is: a folder, a file, or a folder of the hub, downloaded."""

from __future__ import annotations

from pathlib import Path

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.weights.files import DIFFUSERS_STEM, TEXT_STEM, WEIGHTS_SUFFIX
from ds_dpo.models.weights.hub import fetch_folder

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_FILE_SUFFIXES = (WEIGHTS_SUFFIX, *_PICKLES)
_SETTINGS = ("*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")  # files of schedulers, tokenizers and models


def locate_pipeline(model: ModelConfig) -> Path:
    """Return the folder or .safetensors file of model.pretrained; a hub id is downloaded into the hub's cache.

    Raises ModelError if it does not exist, or if a folder is not a diffusers pipeline.
    """
    # only the variant's weights, because a hub model often has several variants and formats
    infix = f".{model.variant}" if model.variant else ""
    folder = FAMILIES[model.family].denoiser.folder
    stems = (f"{folder}/{DIFFUSERS_STEM}", f"vae/{DIFFUSERS_STEM}", f"text_encoder*/{TEXT_STEM}")
    weights = [f"{stem}{infix}{end}" for stem in stems for end in (".safetensors", "-*-of-*.safetensors")]
    place = locate(
        model.pretrained,
        field="model.pretrained",
        revision=model.revision,
        patterns=("model_index.json", *_SETTINGS, *weights),
    )
    if place.is_dir() and not (place / "model_index.json").is_file():
        raise ModelError(
            f"model.pretrained {model.pretrained}: {place} is no diffusers pipeline (no model_index.json); "
            "give a folder written by a pipeline's save_pretrained, or a whole checkpoint in one .safetensors file"
        )
    return place


def locate_vae(name: str) -> Path:
    """Return a VAE's folder with config.json and weights, downloaded for a hub id, or its .safetensors file.

    Raises ModelError if there is none.
    """
    patterns = tuple(
        f"{part}{name}" for part in ("", "vae/") for name in ("config.json", f"{DIFFUSERS_STEM}.safetensors")
    )
    place = locate(name, field="model.vae", revision=None, patterns=patterns)
    found = place if place.is_file() else _with_config(place, "vae")
    if found is None:
        raise ModelError(
            f"model.vae {name}: {place} is not a VAE, since it has neither config.json nor vae/config.json"
        )
    return found


def locate_denoiser(name: str, *, kind: DenoiserKind, field: str = "denoiser_init") -> Path:
    """Return a denoiser's folder with config.json and weights, downloaded for a hub id, or its .safetensors file.

    field: names it in the section `model`. Raises ModelError if there is none.
    """
    stem, inside = DIFFUSERS_STEM, f"{kind.folder}/"
    names = ("config.json", f"{stem}.safetensors", f"{stem}*-of-*.safetensors", f"{stem}*.index.json")
    patterns = tuple(f"{part}{name}" for part in ("", inside) for name in names)
    place = locate(name, field=f"model.{field}", revision=None, patterns=patterns)
    found = place if place.is_file() else _with_config(place, kind.folder)
    if found is None:
        raise ModelError(
            f"model.{field} {name}: {place} is not a {kind.title}, since it has neither config.json nor "
            f"{inside}config.json"
        )
    return found


def _with_config(folder: Path, part: str) -> Path | None:
    for candidate in (folder, folder / part):
        # a whole pipeline may have its own config.json beside model_index.json
        if (candidate / "config.json").is_file() and not (candidate / "model_index.json").is_file():
            return candidate
    return None


def locate(name: str, *, field: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Return the folder or .safetensors file of a name, or a hub id's folder with the files that match.

    field: the configuration's field, for errors. Raises ModelError for a missing file or one that could run code.
    """
    place = Path(resolve_asset(name))
    if place.is_dir():
        return place
    if place.is_file():
        _refuse_pickle(place, field)
        return place
    if place.is_absolute() or name.startswith((".", "~")) or len(place.parts) > 2 or place.suffix in _FILE_SUFFIXES:
        raise ModelError(
            f"{field} {name}: no such file or folder; give a diffusers folder, a {WEIGHTS_SUFFIX} file or a hub id "
            "such as owner/name"
        )
    return fetch_folder(name, revision=revision, patterns=patterns)


def _refuse_pickle(path: Path, field: str) -> None:
    if path.suffix == WEIGHTS_SUFFIX:
        return
    what = "is a pickle, which can run code when it is read" if path.suffix in _PICKLES else "is not a model file"
    raise ModelError(
        f"{field} {path} {what}; only {WEIGHTS_SUFFIX} files and diffusers folders are read: if you trust it, load it "
        "with diffusers' from_single_file and write a folder with save_pretrained"
    )
