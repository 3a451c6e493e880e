"""Find a model's files and read their headers, without reading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.weights.hub import fetch_folder

UNET_STEM = VAE_STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
WEIGHTS_SUFFIX = ".safetensors"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_FILE_SUFFIXES = (WEIGHTS_SUFFIX, *_PICKLES)
_SETTINGS = ("*/*.json", "*/*.txt")  # files of schedulers, tokenizers and models


def locate_pipeline(model: ModelConfig) -> Path:
    """Return the folder or .safetensors file of model.pretrained; a hub id is downloaded into the hub's cache.

    Raises ModelError if it does not exist, or if a folder is not a diffusers pipeline.
    """
    # only the variant's weights, because a hub model often has several variants and formats
    infix = f".{model.variant}" if model.variant else ""
    stems = (f"unet/{UNET_STEM}", f"vae/{VAE_STEM}", f"text_encoder*/{TEXT_STEM}")
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
    patterns = tuple(f"{part}{name}" for part in ("", "vae/") for name in ("config.json", f"{VAE_STEM}.safetensors"))
    place = locate(name, field="model.vae", revision=None, patterns=patterns)
    found = place if place.is_file() else _with_config(place, "vae")
    if found is None:
        raise ModelError(
            f"model.vae {name}: {place} is not a VAE, since it has neither config.json nor vae/config.json"
        )
    return found


def locate_denoiser(name: str) -> Path:
    """Return a UNet's folder with config.json and weights, downloaded for a hub id, or its .safetensors file.

    Raises ModelError if there is none.
    """
    names = ("config.json", f"{UNET_STEM}.safetensors", f"{UNET_STEM}*-of-*.safetensors", f"{UNET_STEM}*.index.json")
    patterns = tuple(f"{part}{name}" for part in ("", "unet/") for name in names)
    place = locate(name, field="model.denoiser_init", revision=None, patterns=patterns)
    found = place if place.is_file() else _with_config(place, "unet")
    if found is None:
        raise ModelError(
            f"model.denoiser_init {name}: {place} is not a UNet, since it has neither config.json nor unet/config.json"
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


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object. Raises ModelError if it is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing, so the model's folder is incomplete") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must contain names and values, not a {type(content).__name__}")
    return content


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The safetensors files of one model, and their variant (None for the plain ones)."""

    paths: tuple[Path, ...]
    variant: str | None

    def num_parameters(self) -> int:
        """Return the number of elements in the files, from their headers."""
        return sum(
            prod(file.get_slice(name).get_shape())
            for file in map(_open, self.paths)
            for name in file.keys()  # noqa: SIM118 (no mapping)
        )

    def num_bytes(self) -> int:
        """Return the size of the files."""
        return sum(path.stat().st_size for path in self.paths)


def find_weights(folder: Path, stem: str, *, variant: str | None) -> WeightFiles:
    """Return the weights of a model's folder, single or sharded, of that variant only.

    stem: beginning of the file names. Raises ModelError that says what is there instead: nothing, pickles, other
    variants.
    """
    infix = f".{variant}" if variant else ""
    single = folder / f"{stem}{infix}.safetensors"
    if single.is_file():
        return WeightFiles(paths=(single,), variant=variant)
    index = folder / f"{stem}.safetensors.index{infix}.json"
    if index.is_file():
        return WeightFiles(paths=_shards(index), variant=variant)
    raise ModelError(_what_is_missing(folder, single.name))


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    # the index comes from outside, so it may only name files in its folder
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelError(f"{index}: its weight_map must name files in the same folder")
    paths = tuple(index.parent / name for name in sorted(names))
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{path}: missing, but {index.name} names it")
    return paths


def _what_is_missing(folder: Path, wanted: str) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder, so the model is incomplete"
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if found and all(name.endswith(".bin") for name in found):
        return (
            f"{folder}: has only pickled weights ({', '.join(found)}), which can run code when read; if you trust "
            "them, load them and write safetensors with save_pretrained"
        )
    return (
        f"{folder}: has no {wanted}, neither whole nor in shards, but {', '.join(found) or 'no weight file'}; "
        "model.variant selects the weights"
    )


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a safetensors file. shapes: shapes of all its tensors by name."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors whose names begin with a prefix, by the rest of their names."""
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}


@cache  # a file of SDXL has 2500 tensors, and several parts of a run read them
def read_header(path: Path) -> Header:
    """Read a file's header. Raises ModelError if it is not safetensors."""
    file = _open(path)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return Header(path=path, shapes=shapes, metadata=file.metadata() or {})


class FileWeights(Mapping[str, Tensor]):
    """A model's tensors by name, in the dtype of the file, each read on request."""

    def __init__(self, files: WeightFiles) -> None:
        """Read the headers. Raises ModelError if a file is not safetensors."""
        self._files = {name: file for file in map(_open, files.paths) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error})") from error
