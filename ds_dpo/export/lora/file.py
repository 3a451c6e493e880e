"""A LoRA's file: the names and metadata that diffusers, or A1111, Forge and ComfyUI (kohya's names), read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError, ConfigError
from ds_dpo.export.clients import is_known_to_kohya
from ds_dpo.export.tensors.safetensors_stream import TensorSpec, write_safetensors
from ds_dpo.models.families.table import family_of
from ds_dpo.models.families.unet import UNET

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
# kohya's readers know these two only under their single-file names
KOHYA_MODULES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
PRIVATE_SETTINGS = ("base_model_name_or_path", "revision", "auto_mapping")  # settings of the training machine


@dataclass(frozen=True)
class LoraLayer:
    """A layer in a LoRA file: shapes of its factors, its scale, and the shape of DoRA's magnitude."""

    down: tuple[int, ...]
    up: tuple[int, ...]
    scale: float
    magnitude: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.down[0]

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in (self.down, self.up, self.magnitude or (0,)))


Part = str  # "down", "up" or "magnitude"
Produce = Callable[[str, Part], Tensor]  # module and part -> values in fp32, in the shape of its LoraLayer


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its module and its part. alpha is a number rather than a part."""

    spec: TensorSpec
    module: str
    part: Part


def write_lora_file(
    path: Path,
    layers: Mapping[str, LoraLayer],
    produce: Produce,
    *,
    naming: str,
    folder: str = UNET.folder,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[TensorSpec]:
    """Write a LoRA under the names of a naming, one tensor in memory at a time, and return the written tensors.

    folder: the denoiser's in a pipeline, a part of the names. Raises ConfigError if the naming has no names for the
    LoRA, and CheckpointError through produce.
    """
    entries = list(NAMINGS[naming](layers, dtype, folder))
    by_name = {entry.spec.name: entry for entry in entries}

    def tensor_of(spec: TensorSpec) -> Tensor:
        entry = by_name[spec.name]
        layer = layers[entry.module]
        if entry.part == "alpha":
            return torch.tensor(layer.scale * layer.rank, dtype=spec.dtype)
        tensor = produce(entry.module, entry.part).to(spec.dtype)
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{entry.module!r}: lora_{entry.part} has values that are NaN, or infinite in {spec.dtype}: the run "
                "has diverged, or needs --dtype fp32"
            )
        return tensor

    specs = [entry.spec for entry in entries]
    write_safetensors(path, specs, tensor_of, metadata=metadata)
    return specs


def lora_specs(layers: Mapping[str, LoraLayer], *, naming: str, folder: str, dtype: torch.dtype) -> list[TensorSpec]:
    """Return the tensors of the file that write_lora_file writes. Raises ConfigError as that does."""
    return [entry.spec for entry in NAMINGS[naming](layers, dtype, folder)]


def _diffusers_entries(layers: Mapping[str, LoraLayer], dtype: torch.dtype, folder: str) -> Iterator[Entry]:
    for module, layer in layers.items():
        yield Entry(TensorSpec(f"{folder}.{module}.lora_A.weight", layer.down, dtype), module, "down")
        yield Entry(TensorSpec(f"{folder}.{module}.lora_B.weight", layer.up, dtype), module, "up")
        if layer.magnitude is not None:
            spec = TensorSpec(f"{folder}.{module}.lora_magnitude_vector", layer.magnitude, dtype)
            yield Entry(spec, module, "magnitude")


def _kohya_entries(layers: Mapping[str, LoraLayer], dtype: torch.dtype, folder: str) -> Iterator[Entry]:
    # sd-scripts (networks/lora.py, convert_diffusers_to_sai_if_needed) fails on a file that begins with a module that
    # it does not know
    modules = sorted(layers, key=is_known_to_kohya, reverse=True)
    named = {module: f"lora_{folder}_{KOHYA_MODULES.get(module, module).replace('.', '_')}" for module in modules}
    # With dora_scale, ComfyUI and Forge use the norms of the base's rows, A1111 those of its columns, and peft those of
    # the changed weight's rows: no number in the file suits all of them.
    # fp32 tensors come first, because readers need each tensor aligned to its item size
    for module, name in named.items():
        if layers[module].magnitude is not None:
            raise ConfigError(
                "--lora_naming kohya: this is a DoRA, and the programs that read kohya's names divide by other norms "
                "than it was trained with; give --lora_naming diffusers, or merge it with --format denoiser or "
                "single-file"
            )
        yield Entry(TensorSpec(f"{name}.alpha", (), torch.float32), module, "alpha")
    for module, name in named.items():
        yield Entry(TensorSpec(f"{name}.lora_down.weight", layers[module].down, dtype), module, "down")
        yield Entry(TensorSpec(f"{name}.lora_up.weight", layers[module].up, dtype), module, "up")


NAMINGS: dict[str, Callable[[Mapping[str, LoraLayer], torch.dtype, str], Iterator[Entry]]] = {
    "diffusers": _diffusers_entries,
    "kohya": _kohya_entries,
}


def diffusers_metadata(
    layers: Mapping[str, LoraLayer], settings: Mapping[str, Any], *, folder: str = UNET.folder
) -> dict[str, str]:
    """Return the adapter's peft configuration as diffusers' save_lora_weights writes it.

    settings: those of the run's adapter, {} for a computed LoRA. folder: of the denoiser in a pipeline.
    """
    known = {name: value for name, value in settings.items() if name not in PRIVATE_SETTINGS}
    if known.get("lora_dropout"):
        known["lora_dropout"] = 0.0  # diffusers puts layers into a pipeline in training mode, which would drop inputs
    if "r" not in known:
        known = {**_settings_of(layers), **known}
    packed = {f"{folder}.{name}": value for name, value in known.items()}
    return {METADATA_KEY: json.dumps(packed, indent=2, sort_keys=True)}


def _settings_of(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Return a peft configuration of these layers."""
    ranks = [layer.rank for layer in layers.values()]
    rank = max(sorted(set(ranks)), key=ranks.count)
    other = {module: layer for module, layer in layers.items() if layer.rank != rank}
    alphas = {module: layer.scale * layer.rank for module, layer in layers.items()}
    first = next(module for module in layers if module not in other)
    # ^: match the whole name, not only its end
    return {
        "r": rank,
        "lora_alpha": _number(alphas[first]),
        "rank_pattern": {f"^{module}": layer.rank for module, layer in other.items()},
        "alpha_pattern": {f"^{module}": _number(alphas[module]) for module in other},
        "target_modules": sorted(layers),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "use_rslora": False,
        "lora_bias": False,
    }


def kohya_metadata(layers: Mapping[str, LoraLayer], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata that kohya's trainer writes and by which A1111 sorts LoRAs."""
    ranks: Sequence[int] = sorted({layer.rank for layer in layers.values()})
    alphas = sorted({layer.scale * layer.rank for layer in layers.values()})
    family = family_of(config)
    base = {} if family is None else {"ss_base_model_version": family.published.kohya_base}
    return {
        "ss_network_module": "networks.lora",
        **base,
        "ss_v2": str(family is not None and family.published.is_kohya_v2),
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas[0]:g}" if len(alphas) == 1 else "Dynamic",
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
