"""Tiny random models of each family, and the same as one file under the names of Stability's and CompVis' own code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.models.weights.ldm_keys import ldm_names
from ds_dpo.models.weights.ldm_parts import Stored, clip_places, open_clip_places, vae_places

CONFIGS = Path(resolve_asset("ds_dpo://assets/model_configs"))
WIDTHS = {"sdxl": [64, 64, 128], "sdxl_refiner": [64, 64, 128, 128]}
SMALL_UNETS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "block_out_channels": [64, 64, 128],
        "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
        "transformer_layers_per_block": [1, 1, 2],
    },
    # SSD-1B's own way of having fewer layers, other ones on the way up, and a resnet alone in the middle
    "ssd": {
        "block_out_channels": [64, 64, 128],
        "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
        "transformer_layers_per_block": [1, [2, 1], [1, 1]],
        "reverse_transformer_layers_per_block": [[1, 1, 2], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "sdxl_refiner": {
        "block_out_channels": [64, 64, 64, 128],
        "attention_head_dim": [1, 1, 1, 2],
        "cross_attention_dim": 64,
        "projection_class_embeddings_input_dim": 64 + 5 * 256,
        "transformer_layers_per_block": 2,
    },
    "sd15": {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 64},
    "sd21": {
        "block_out_channels": [64, 64, 64, 128],
        "attention_head_dim": [1, 1, 1, 2],
        "cross_attention_dim": 64,
    },
}
FAMILY = {name: "sdxl" if name == "ssd" else name for name in SMALL_UNETS}
TEXTS: dict[str, dict[str, tuple[type, Any, str]]] = {
    "sdxl": {
        "text_encoder": (CLIPTextModel, clip_places, "conditioner.embedders.0.transformer."),
        "text_encoder_2": (CLIPTextModelWithProjection, open_clip_places, "conditioner.embedders.1.model."),
    },
    "sdxl_refiner": {
        "text_encoder_2": (CLIPTextModelWithProjection, open_clip_places, "conditioner.embedders.0.model.")
    },
    "sd15": {"text_encoder": (CLIPTextModel, clip_places, "cond_stage_model.transformer.")},
    "sd21": {"text_encoder": (CLIPTextModel, open_clip_places, "cond_stage_model.model.")},
}


@dataclass(frozen=True)
class TinyModel:
    """Modules by diffusers' folder names."""

    family: str
    modules: Mapping[str, Any]

    def single_file(self) -> dict[str, Tensor]:
        """All weights under their names in one file."""
        unet, vae = self.modules["unet"], self.modules["vae"]
        own = unet.state_dict()
        tensors = {ldm: own[name] for name, ldm in ldm_names(own, unet.config).items()}
        places = vae_places(vae.state_dict(), num_blocks=len(vae.config["block_out_channels"]))
        tensors |= written(vae, places, prefix="first_stage_model.")
        for name, (_, places_of, prefix) in TEXTS[self.family].items():
            tensors |= written(self.modules[name], places_of(self.modules[name].state_dict()), prefix=prefix)
        if self.family == "sd21":  # files hold a last layer that the UNet has never seen
            last = "cond_stage_model.model.transformer.resblocks."
            tensors |= {
                name.replace(f"{last}1.", f"{last}2."): tensor + 1
                for name, tensor in list(tensors.items())
                if name.startswith(f"{last}1.")
            }
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def save_file(self, path: Path, *, more: Mapping[str, Tensor] | None = None, metadata: Any = None) -> Path:
        save_file({**self.single_file(), **(more or {})}, path, metadata=metadata)
        return path


def written(module: nn.Module, places: Mapping[str, Stored], *, prefix: str) -> dict[str, Tensor]:
    """A module's weights as a file keeps them."""
    thirds: dict[str, dict[int, Tensor]] = {}
    tensors = {}
    for name, tensor in module.state_dict().items():
        place = places[name]
        if len(place.shares) > 1:
            thirds.setdefault(place.name, {})[place.place] = tensor
            continue
        value = tensor.T if place.is_transposed else tensor
        tensors[prefix + place.name] = value[:, :, None, None] if place.is_convolution else value
    joined = {prefix + name: torch.cat([parts[number] for number in range(3)]) for name, parts in thirds.items()}
    return {**tensors, **joined}


def tiny_model(name: str, *, vocabulary: int = 99, seed: int = 0) -> TinyModel:
    """A random model of a family; `ssd` is SDXL with a UNet as SSD-1B's."""
    family = FAMILY[name]
    unet: Any = UNet2DConditionModel.from_config({**shipped(family, "unet"), **SMALL_UNETS[name]})
    small_vae = {"block_out_channels": [32, 64], "layers_per_block": 1}
    small_vae |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae: Any = AutoencoderKL.from_config({**shipped(family, "vae"), **small_vae})
    modules = {"unet": unet, "vae": vae}
    small_text = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2}
    for part, (model_class, _, _) in TEXTS[family].items():
        config = {**shipped(family, part), **small_text, "projection_dim": 64, "vocab_size": vocabulary}
        modules[part] = model_class(CLIPTextConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return TinyModel(family, modules)


def shipped(family: str, part: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / family / part / "config.json").read_text())
    return content
