"""Write the denoiser as A1111, Forge and ComfyUI read it: alone or into a copy of a base file, tensor by tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ds_dpo.errors import ModelError
from ds_dpo.export.card.modelspec import merge_metadata
from ds_dpo.export.denoiser import check_parameters, expected_shapes, read_finite
from ds_dpo.export.tensors.safetensors_stream import DTYPE_NAMES, HEADER_ALIGNMENT_BYTES, TensorSpec, write_safetensors
from ds_dpo.export.tensors.weights import Weights
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.families.table import family_of, kind_of
from ds_dpo.models.weights import file_flags
from ds_dpo.models.weights.files import read_json, shipped_configs
from ds_dpo.outside import check_regular

EMA_PREFIX = "model_ema."
HEADS_NAME = "attention_head_dim"  # a misnomer of diffusers: the number of heads, for all blocks or for each
COPY_BYTES = 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its dtype in the format's words, its shape, and the place of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def item_bytes(self) -> float:
        """Bytes of an element; infinite without elements, so that a flag begins at an aligned place."""
        return self.num_bytes // math.prod(self.shape) if math.prod(self.shape) else math.inf


@dataclass(frozen=True)
class BaseFile:
    """A safetensors file, from its header. start and stop of its tensors count from the beginning of the file."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Stored]


def read_base_file(path: Path) -> BaseFile:
    """Read the header of a safetensors file, which the library checks first. Raises ModelError for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, framework="pt"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error})") from error
    metadata = header.pop("__metadata__", {})
    data = 8 + length
    tensors = {
        name: Stored(entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    }
    return BaseFile(path, metadata, tensors)


def check_base_file(base: BaseFile, expected: Mapping[str, tuple[int, ...]], kind: DenoiserKind) -> None:
    """Raise ModelError that names the first difference, unless the file's denoiser has these names and shapes."""
    found = {name: stored.shape for name, stored in base.tensors.items() if name.startswith(kind.prefix)}
    if not found:
        raise ModelError(f"{base.path}: has no tensor under {kind.prefix!r}; give a whole checkpoint")
    differing = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
    if differing:
        name, title = differing[0], kind.title
        raise ModelError(
            f"{base.path}: holds another {title}: {len(differing)} tensors differ; the first, {name!r}, is "
            f"{found.get(name, 'absent')} in the file and {expected.get(name, 'absent')} in the checkpoint's {title}"
        )


def single_file_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a denoiser's tensors in a single file. Raises ModelError if no such names exist."""
    shapes = expected_shapes(config)
    return {name: place.shape(shapes) for name, place in kind_of(config).tensors_in_file(shapes, config).items()}


def check_carried(config: Mapping[str, Any]) -> None:
    """Raise ModelError if a reader of a single file would give a denoiser of these shapes other settings than its own.

    A file holds shapes alone, and all else is that of the family. Sizes that no reader knows pass: none can read them.
    """
    family = family_of(config)
    if family is None:
        return
    kind = kind_of(config)
    shapes = {name.removeprefix(kind.prefix): shape for name, shape in single_file_shapes(config).items()}
    try:
        usual = read_json(shipped_configs(family.name) / kind.folder / "config.json")
        taken = kind.derive(shapes, usual)
    except ModelError:
        return
    for name, default in kind.unseen_settings.items():
        own, other = (_setting(source, name, default) for source in (config, taken))
        if own != other:
            raise ModelError(
                f"--format single-file cannot hold this {kind.title}: its {name} is {own}, but programs that read such "
                f"a file take {other} for a {kind.title} of {family.name} with these widths; use --format denoiser or "
                "pipeline"
            )


def _setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    if name != HEADS_NAME:
        return value
    return list(value) if isinstance(value, Sequence) else [value] * len(config["block_out_channels"])


def write_single_file(
    path: Path,
    weights: Weights,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    base: BaseFile | None = None,
    flags: frozenset[str] | None = None,
) -> list[TensorSpec]:
    """Write the denoiser under its single-file names, alone or with a byte-by-byte copy of all else in base.

    flags: names of models.weights.file_flags, each written as a tensor without elements; the base's own flags are left
    out. None keeps those. Holds one tensor of the file and its parts in memory. Returns the denoiser's own tensors.
    Raises CheckpointError if the weights do not fit the configuration or are not finite in dtype, and ModelError where
    the base has another denoiser.
    """
    shapes = expected_shapes(config)
    check_parameters(weights, shapes)
    places = kind_of(config).tensors_in_file(shapes, config)
    specs = [TensorSpec(name, place.shape(shapes), dtype) for name, place in sorted(places.items())]

    def produce(spec: TensorSpec) -> torch.Tensor:
        place = places[spec.name]
        return place.join([read_finite(weights, TensorSpec(part, shapes[part], spec.dtype)) for part in place.parts])

    flag_specs = [TensorSpec(name, (0,), torch.float32) for name in sorted(flags or ())]
    if base is None:

        def produce_all(spec: TensorSpec) -> torch.Tensor:
            return torch.empty(0) if spec in flag_specs else produce(spec)

        write_safetensors(path, [*flag_specs, *specs], produce_all, metadata=metadata)
        return specs
    check_base_file(base, {spec.name: spec.shape for spec in specs}, kind_of(config))
    own = {spec.name: spec for spec in specs}
    others = others_of(base, own, flags)
    layout = _lay_out(base, others, [*flag_specs, *specs])
    with path.open("wb") as target, base.path.open("rb") as source:
        _write_header(target, layout, merge_metadata(base.metadata, metadata))
        for name in layout:
            if name in own:
                target.write(produce(own[name]).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            elif name in others:
                _copy_range(source, target, base.tensors[name])
    return specs


def others_of(base: BaseFile, own: Collection[str], flags: frozenset[str] | None) -> frozenset[str]:
    """Return the names of the tensors that are copied: all but the denoiser's, and but the flags unless flags is None.

    own: names of the denoiser's tensors.
    """
    return frozenset(base.tensors) - frozenset(own) - (frozenset() if flags is None else file_flags.ALL)


def _lay_out(base: BaseFile, others: Collection[str], specs: Sequence[TensorSpec]) -> dict[str, Stored]:
    """Return the new file's tensors in order: larger items first, since readers need tensors aligned to items."""
    entries = {name: base.tensors[name] for name in others}
    entries |= {spec.name: Stored(DTYPE_NAMES[spec.dtype], spec.shape, 0, spec.num_bytes) for spec in specs}
    starts = {name: stored.start for name, stored in base.tensors.items()}
    order = sorted(entries, key=lambda name: (-entries[name].item_bytes, starts.get(name, 0), name))
    layout, start = {}, 0
    for name in order:
        entry = entries[name]
        stop = start + entry.num_bytes
        layout[name] = Stored(entry.dtype, entry.shape, start, stop)
        start = stop
    return layout


def _write_header(file: BinaryIO, layout: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, entry in layout.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)


def _copy_range(source: BinaryIO, target: BinaryIO, stored: Stored) -> None:
    source.seek(stored.start)
    left = stored.num_bytes
    while left:
        chunk = source.read(min(left, COPY_BYTES))
        if not chunk:
            raise ModelError(f"{source.name}: became shorter during reading")
        target.write(chunk)
        left -= len(chunk)
