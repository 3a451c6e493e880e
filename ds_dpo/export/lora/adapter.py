"""The LoRA of a run that trained one: its layers and settings in a checkpoint, and its merger into the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError, ConfigError, cut
from ds_dpo.export.lora.file import LoraLayer
from ds_dpo.export.tensors.frozen import read_frozen
from ds_dpo.export.tensors.weights import Derived, Weights
from ds_dpo.outside import parse_json
from ds_dpo.zero_shards.layout import Placement

SETTINGS_NAME = "adapter_config.json"
# as peft names them inside a model: MODULE.lora_A.ADAPTER.weight
LORA_NAME = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector|embedding_A|embedding_B)\.(?P<adapter>[^.]+)"
    r"(?:\.(?P<parameter>weight|bias))?"
)
BASE_LAYER = ".base_layer."


@dataclass(frozen=True)
class Layer:
    """The parameters that a LoRA adds to one linear or convolution layer, by name, and its scale.

    The layer's weight becomes weight + scale * up @ down; with a magnitude (DoRA) each row then gets that norm.
    """

    down: str
    up: str
    rank: int
    scale: float
    magnitude: str | None = None


@dataclass(frozen=True)
class Adapter:
    """The LoRA of a run: its layers by the name of their module, and its settings as peft writes them."""

    layers: Mapping[str, Layer]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters that it adds to the UNet."""
        named = {name for layer in self.layers.values() for name in (layer.down, layer.up, layer.magnitude)}
        return {name for name in named if name is not None}


def find_adapter(weights: Weights, *, lora_alpha: float | None = None) -> Adapter | None:
    """Return the LoRA among these weights; None if there is none.

    Its settings are those of adapter_config.json beside the checkpoint; lora_alpha replaces a missing file.
    Raises CheckpointError for several adapters, for parts that a LoRA file cannot hold, and for layers without a
    partner, and ConfigError if the scale is unknown or given twice.
    """
    parts: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in weights.parameters:
        match = LORA_NAME.fullmatch(name)
        if match is None:
            continue
        part = match["part"]
        if part.startswith("embedding") or match["parameter"] == "bias":
            raise CheckpointError(f"{weights.folder}: {name!r} belongs to a kind of LoRA that is not supported")
        adapters.add(match["adapter"])
        parts.setdefault(match["module"], {})[part] = name
    if not parts:
        return None
    if len(adapters) > 1:
        raise CheckpointError(f"{weights.folder}: has several adapters ({', '.join(sorted(adapters))}) instead of one")
    settings = read_settings(weights.folder, lora_alpha=lora_alpha)
    layers = {module: _layer(weights, module, found, settings) for module, found in sorted(parts.items())}
    return Adapter(layers, settings)


def read_settings(folder: Path, *, lora_alpha: float | None) -> dict[str, Any]:
    """Return the adapter's settings as peft writes them, or only lora_alpha if the file is missing."""
    path = folder / SETTINGS_NAME
    if not path.is_file():
        if lora_alpha is None:
            raise ConfigError(
                f"{path} is missing, and a LoRA's weights do not state their scale, lora_alpha / rank: "
                "add --lora_alpha with the run's value"
            )
        return {"lora_alpha": lora_alpha}
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
        alpha = float(settings["lora_alpha"])
        patterns = [dict(settings.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not the settings of a LoRA in peft's form ({cut(repr(error))})") from error
    if lora_alpha is not None and lora_alpha != alpha:
        raise ConfigError(f"--lora_alpha {lora_alpha:g}: {path} says {alpha:g}; leave the option out")
    if settings.get("bias", "none") != "none" or settings.get("modules_to_save"):
        raise CheckpointError(
            f"{path}: bias {settings.get('bias')!r} and modules_to_save {settings.get('modules_to_save')}: "
            "these were trained beside the LoRA, and neither a LoRA file nor merged weights would hold them"
        )
    return {**settings, "rank_pattern": patterns[0], "alpha_pattern": patterns[1]}


def _layer(weights: Weights, module: str, parts: Mapping[str, str], settings: Mapping[str, Any]) -> Layer:
    missing = {"A", "B"} - parts.keys()
    if missing:
        raise CheckpointError(f"{weights.folder}: {module!r} has no lora_{missing.pop()}")
    down, up = (weights.parameters[parts[part]].shape for part in ("A", "B"))
    rank = down[0]
    if up[1] != rank:
        raise CheckpointError(f"{weights.folder}: {module!r}: lora_A {down} and lora_B {up} do not fit together")
    alpha = _of_module(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
    scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Layer(parts["A"], parts["B"], rank, scale, parts.get("magnitude_vector"))


def _of_module(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    # the same choice as peft.utils.get_pattern_key
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def merge_adapter(weights: Weights, adapter: Adapter, base: Mapping[str, Tensor] | None) -> Weights:
    """Return the UNet's weights under their own names, with the LoRA merged in, computed in fp32.

    base: the base's own weights, if available. A frozen weight comes from there if the checkpoint holds its rounding to
    16 bit, which has fewer digits, or was saved without frozen weights.
    """
    of_adapter = adapter.parameters
    saved = {name.replace(BASE_LAYER, "."): name for name in weights.parameters if name not in of_adapter}
    parameters = {name: weights.parameters[own] for name, own in saved.items()}
    if not saved and base is not None:
        parameters = {name: Placement(tuple(tensor.shape), (), is_frozen=True) for name, tensor in base.items()}

    def frozen(name: str) -> Tensor:
        if name not in saved:
            assert base is not None
            return base[name].to(torch.float32, copy=True)
        return read_frozen(weights, saved[name], base, name)

    def read(name: str, dtype: torch.dtype) -> Tensor:
        module, _, parameter = name.rpartition(".")
        weight = frozen(name)
        if parameter == "weight" and module in adapter.layers:
            weight = _merge(weights, adapter.layers[module], weight)
        return weight.to(dtype)

    return Derived(weights.folder, parameters, read)


def _merge(weights: Weights, layer: Layer, weight: Tensor) -> Tensor:
    """Add a layer's LoRA to its weight, in place, and scale the rows to DoRA's norms.

    Source: peft's get_delta_weight and merge of lora/layer.py and lora/dora.py.
    """
    down, up = weights.read(layer.down).flatten(1), weights.read(layer.up).flatten(1)
    rows = weight.flatten(1).addmm_(up, down, alpha=layer.scale)
    if layer.magnitude is not None:
        magnitude = weights.read(layer.magnitude).flatten()
        rows.mul_((magnitude / torch.linalg.vector_norm(rows, dim=1))[:, None])
    return rows.view(weight.shape)


def file_layers(weights: Weights, adapter: Adapter, expected: Mapping[str, tuple[int, ...]]) -> dict[str, LoraLayer]:
    """Return the layers of a LoRA file. expected: shapes of the UNet's parameters.

    Raises CheckpointError if the UNet does not have a layer, or has other shapes.
    """
    found = {}
    for module, layer in adapter.layers.items():
        down, up = (weights.parameters[name].shape for name in (layer.down, layer.up))
        shape = expected.get(f"{module}.weight")
        if shape is None or (up[0], down[1:]) != (shape[0], shape[1:]):
            raise CheckpointError(
                f"{weights.folder}: the LoRA of {module!r} is {down} and {up}, but the UNet has {shape or 'no weight'}"
            )
        magnitude = None if layer.magnitude is None else weights.parameters[layer.magnitude].shape
        found[module] = LoraLayer(down, up, layer.scale, magnitude)
    return found


def read_part(weights: Weights, adapter: Adapter, module: str, part: str) -> Tensor:
    """Return a tensor of a LoRA file: down, up or magnitude of a module, in fp32."""
    name = getattr(adapter.layers[module], part)
    return weights.read(name)


def is_untrained(weights: Weights, adapter: Adapter) -> bool:
    """Return whether every lora_B is still zero, as it starts; then the LoRA changes nothing."""
    return not any(weights.read(layer.up).any() for layer in adapter.layers.values())
