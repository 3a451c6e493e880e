"""Write the denoiser of a checkpoint in diffusers' form, and check each tensor while it is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError, ModelError
from ds_dpo.export.tensors.safetensors_stream import TensorSpec, split_into_files, stream_safetensors
from ds_dpo.export.tensors.weights import Weights
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.families.table import kind_of
from ds_dpo.models.weights.files import DIFFUSERS_STEM
from ds_dpo.zero_shards.reader import ZeroCheckpoint

SQUARE_THAT_FITS = 6e4**2  # fp16, the narrowest, goes to 65504
MAX_FILE_BYTES = 10 * 10**9  # diffusers' own limit of one file


@dataclasses.dataclass(frozen=True)
class WrittenDenoiser:
    """The written denoiser: number of tensors, bytes of data, file names."""

    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a denoiser's parameters and tables, by its configuration, without memory for weights.

    Raises ModelError for a configuration of another class, or one that diffusers refuses.
    """
    return dict(_shapes_of(json.dumps(dict(config), sort_keys=True, default=list)))


@functools.lru_cache(maxsize=4)  # building SDXL's takes a second, and an export asks several times
def _shapes_of(config_json: str) -> dict[str, tuple[int, ...]]:
    config = json.loads(config_json)
    kind = kind_of(config)
    known = kind.shapes(config)
    return _built_shapes(kind, config) if known is None else {**known, **kind.tables(config)}


def _built_shapes(kind: DenoiserKind, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            denoiser = kind.model_class().from_config(config)
    except (TypeError, ValueError) as error:
        raise ModelError(f"diffusers cannot build a {kind.title} from the configuration: {error}") from error
    return {name: tuple(parameter.shape) for name, parameter in denoiser.state_dict().items()}


def check_parameters(checkpoint: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the checkpoint has exactly the expected parameters, with their shapes."""
    found = {name: placement.shape for name, placement in checkpoint.parameters.items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if missing or unknown or other:
        example = (missing or unknown or other)[0]
        raise CheckpointError(
            f"{checkpoint.folder}: not the weights of this configuration: {len(missing)} parameters missing, "
            f"{len(unknown)} unknown, {len(other)} of another shape; first: {example!r} "
            f"is {found.get(example, 'absent')}, expected {expected.get(example, 'absent')}"
        )
    empty = sorted(name for name, shape in found.items() if math.prod(shape) == 0)
    if empty:
        raise CheckpointError(f"{checkpoint.folder}: parameter {empty[0]!r} has no elements")


def write_denoiser(
    checkpoint: Weights,
    config: Mapping[str, Any],
    folder: Path,
    *,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    variant: str | None = None,
) -> WrittenDenoiser:
    """Write folder/config.json and the weights, rounded from the fp32 master, in one file or several with an index.

    variant: the files get names for from_pretrained(variant=...). Holds one tensor in memory.
    Raises CheckpointError if parameters do not fit the configuration or where a value is not finite in dtype.
    """
    expected = expected_shapes(config)
    check_parameters(checkpoint, expected)
    specs = [TensorSpec(name, shape, dtype) for name, shape in sorted(expected.items())]
    files = split_into_files(specs, max_bytes=max_file_bytes)
    names = weight_file_names(len(files), variant=variant)
    folder.mkdir(parents=True)
    for name, content in zip(names, files, strict=True):
        stream_safetensors(folder / name, content, functools.partial(fill_finite, checkpoint))
    num_bytes = sum(spec.num_bytes for spec in specs)
    if len(files) > 1:
        placed = {spec.name: name for name, content in zip(names, files, strict=True) for spec in content}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": placed}
        _write_json(folder / f"{DIFFUSERS_STEM}.safetensors.index{_infix(variant)}.json", index)
    # _name_or_path is the base's path on the training machine
    published = {key: value for key, value in config.items() if key != "_name_or_path"}
    _write_json(folder / "config.json", {**published, "_class_name": kind_of(config).class_name})
    _check_written(folder, names, specs)
    return WrittenDenoiser(num_tensors=len(specs), num_bytes=num_bytes, files=tuple(names))


def weight_file_names(number: int, *, variant: str | None = None) -> list[str]:
    """Return diffusers' names of weight files, for one file or several, and for a variant such as fp16."""
    stem = f"{DIFFUSERS_STEM}{_infix(variant)}"
    if number == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{place:05d}-of-{number:05d}.safetensors" for place in range(1, number + 1)]


def _infix(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def read_finite(checkpoint: Weights, spec: TensorSpec) -> Tensor:
    """Read a weight in its output dtype. Raises CheckpointError if a value is NaN, infinite, or overflows."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    fill_finite(checkpoint, spec, tensor)
    return tensor


def fill_finite(checkpoint: Weights, spec: TensorSpec, place: Tensor) -> None:
    """Read a weight into place, of its shape and output dtype. Raises as read_finite does."""

    def inspect(piece: Tensor) -> None:
        if not fits_dtype(piece, spec.dtype):
            raise CheckpointError(f"{checkpoint.folder}: {spec.name!r} {_what_is_wrong(checkpoint, spec)}")

    if isinstance(checkpoint, ZeroCheckpoint):
        checkpoint.read(spec.name, out=place, inspect=inspect)
    else:
        place.copy_(checkpoint.read(spec.name, dtype=spec.dtype))
        inspect(place.view(-1))


def fits_dtype(values: Tensor, dtype: torch.dtype) -> bool:
    """Return whether each of some flat values is finite in dtype.

    The sum of squares usually decides this, in half the time of a search for the largest value: if it is finite, all
    values are, and none is larger than its root.
    """
    if float(torch.dot(values, values)) < SQUARE_THAT_FITS:
        return True
    lowest, highest = torch.aminmax(values.to(dtype))
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())


def _what_is_wrong(checkpoint: Weights, spec: TensorSpec) -> str:
    master = checkpoint.read(spec.name)
    bad = int((~master.isfinite()).sum())
    if bad:
        return f"has {bad} values of {master.numel()} that are NaN or infinite: the run has diverged"
    limit = torch.finfo(spec.dtype).max
    return f"reaches {float(master.abs().max()):.6g}, but {spec.dtype} only holds {limit:.6g}; use --dtype bf16 or fp32"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_written(folder: Path, names: list[str], specs: list[TensorSpec]) -> None:
    """Read the headers again with the library that other programs use."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    assert found == {spec.name: spec.shape for spec in specs}, f"{folder}: written header differs"
