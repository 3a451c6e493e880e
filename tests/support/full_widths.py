"""UNets as wide as published ones, with one layer of each kind and seeded weights, and batches of pairs for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.models.loading import load_denoiser

_DRAWN = 1 << 16


def wide_config(family: str) -> dict[str, Any]:
    """Return a published UNet's configuration with one layer per block, and one level of each width.

    Its last level is the published one's, which in SD 1.5 and 2.1 has no attention; there the middle block has it at
    the same width.
    """
    config = json.loads((_published(family) / "unet" / "config.json").read_text())
    widths, heads = config["block_out_channels"], config["attention_head_dim"]
    kept = [*range(len(set(widths)) - 1), len(widths) - 1]

    def levels(of_each: list[Any]) -> list[Any]:
        return [of_each[level] for level in kept]

    return config | {
        "block_out_channels": levels(widths),
        "down_block_types": levels(config["down_block_types"]),
        "up_block_types": levels(config["up_block_types"][::-1])[::-1],
        "attention_head_dim": levels(heads) if isinstance(heads, list) else heads,
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
    }


def load_wide(family: str, folder: Path, *, dtype: torch.dtype) -> ModelMixin:
    """Return such a UNet with seeded weights, as a run loads its policy. folder: does not exist yet."""
    # contents alone, as the shipped files may be read-only
    shutil.copytree(_published(family), folder, copy_function=shutil.copyfile)
    for inside in (folder / "unet", folder / "unet" / "config.json"):
        inside.chmod(0o755)
    config = wide_config(family)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(config)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    model = ModelConfig(pretrained=str(folder), family=family)  # type: ignore[arg-type]
    return load_denoiser(model, dtype=dtype, start=seeded_weights(shapes, dtype=dtype))


def seeded_weights(shapes: Mapping[str, torch.Size], *, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Return norms of 1, and other weights of deviation 0.02 that repeat every 65536 elements: fast to draw."""
    generator = torch.Generator().manual_seed(0)
    drawn = (0.02 * torch.randn(_DRAWN, generator=generator)).to(dtype)

    def weight(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=dtype)
        return drawn.repeat(shape.numel() // _DRAWN + 1)[: shape.numel()].view(shape)

    return {name: weight(name, shape) for name, shape in shapes.items()}


def wide_pair(config: Mapping[str, Any], *, size: int, layout: torch.memory_format) -> PreferenceBatch:
    """Return one pair of square latents for a UNet of this configuration. layout: that of the latents in memory."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    is_sdxl = config.get("addition_embed_type") == "text_time"
    return PreferenceBatch(
        latents=draw(2, 4, size, size).contiguous(memory_format=layout),
        noise=draw(1, 4, size, size),
        timesteps=torch.tensor([400]),
        text_states=draw(1, 8, config["cross_attention_dim"]),
        pooled=draw(1, 1280) if is_sdxl else None,
        extras={"time_ids": torch.full((2, 6), 256.0)} if is_sdxl else {},
        pair_ids=torch.tensor([7]),
        target_probabilities=torch.ones(1),
        weights=torch.ones(1),
    )


def _published(family: str) -> Path:
    return Path(resolve_asset(f"ds_dpo://assets/model_configs/{family}"))
