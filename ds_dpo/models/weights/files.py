"""Find a model's files and read their headers, without reading a weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.config import documents
from ds_dpo.config.asset_paths import ASSET_PREFIX, resolve_asset
from ds_dpo.errors import ConfigError, ModelError, cut
from ds_dpo.models.weights.soundness import require_no_scales
from ds_dpo.outside import check_regular

DIFFUSERS_STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
WEIGHTS_SUFFIX = ".safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object. Raises ModelError if it is missing or holds something else."""
    if not path.exists():
        raise ModelError(f"{path}: missing, so the model's folder is incomplete")
    try:
        return documents.read_json(path, dict)
    except ConfigError as error:
        raise ModelError(str(error)) from error


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
        return WeightFiles(paths=index_files(index), variant=variant)
    raise ModelError(_what_is_missing(folder, single.name))


def index_files(index: Path) -> tuple[Path, ...]:
    """Return the files that an index names. Raises ModelError if one is missing or not in its folder."""
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
        opened = [(path, _open(path)) for path in files.paths]
        self._files = {name: file for _, file in opened for name in file.keys()}  # noqa: SIM118
        self._paths = {name: path for path, file in opened for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        with _safetensors(self._paths[name]):
            tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def check_headers(files: WeightFiles) -> None:
    """Raise ModelError, which names the file, if a file is missing, torn, or not safetensors; reads headers alone."""
    for path in files.paths:
        _open(path)


def _open(path: Path) -> Any:
    from safetensors import safe_open

    with _safetensors(path):
        check_regular(path)
        file = safe_open(path, framework="pt")
    require_no_scales(file.keys(), source=str(path))
    return file


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    """Turn what safetensors raises for a file into a ModelError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({cut(str(error))})") from error


def shipped_configs(name: str) -> Path:
    """Return the folder of configurations that ships under a name: a family's, or a tokenizer's."""
    return Path(resolve_asset(f"{ASSET_PREFIX}assets/model_configs")) / name
