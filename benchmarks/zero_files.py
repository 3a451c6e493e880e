"""Write the checkpoint of a UNet in DeepSpeed's own file format, with seeded values and without training it.

The AdamW moments are left out, since neither converter reads them. The 16-bit copy of the weights that ZeRO 2 leaves in
the model states is there, as in every such checkpoint, but holds zeros: no output depends on it, though DeepSpeed's
converter reads it into memory. It can be left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
TAG = "global_step1000"
SUB_GROUP_ELEMENTS = 10**9  # DeepSpeed's default of sub_group_size
DEVIATION = 0.02

# unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, but for names of versions and paths
SDXL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


SDXL_HEAD_WIDTH = 64


def unet_config(scale: float) -> dict[str, Any]:
    """Return SDXL's UNet with its channels times scale, rounded to what its normalisation can divide."""
    groups = SDXL["norm_num_groups"]
    channels = [max(1, round(width * scale / groups)) * groups for width in SDXL["block_out_channels"]]
    # heads of SDXL's width, narrower ones where that does not divide the channels: no number of weights depends on it
    head_width = math.gcd(SDXL_HEAD_WIDTH, *channels)
    return {**SDXL, "block_out_channels": channels, "attention_head_dim": [width // head_width for width in channels]}


def unet_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, in the module's order."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}


def write_checkpoint(folder: Path, *, stage: int, num_ranks: int, scale: float, with_module: bool = True) -> int:
    """Write folder/latest and folder/TAG with the model's configuration and shards; returns the elements written.

    with_module: ZeRO 2 has the 16-bit weights in the model states too.
    """
    config = unet_config(scale)
    shapes = unet_shapes(config)
    tag = folder / TAG
    tag.mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    (tag / "denoiser_config.json").write_text(json.dumps(config))
    if stage == 3:
        _write_split(tag, shapes, num_ranks)
    else:
        _write_cut(tag, shapes, num_ranks, with_module=with_module)
    return sum(math.prod(shape) for shape in shapes.values())


def _write_split(tag: Path, shapes: Shapes, num_ranks: int) -> None:
    """ZeRO 3: each parameter in equal parts, sub-group by sub-group."""
    groups = list(_sub_groups(shapes, num_ranks))
    # the module holds an empty tensor for each parameter
    placeholders = {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes}
    for rank in range(num_ranks):
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(_model_state(groups, placeholders, num_ranks, stage=3), tag / f"{prefix}_model_states.pt")
        sizes = [sum(math.ceil(math.prod(shape) / num_ranks) for shape in group.values()) for group in groups]
        inner = {
            "zero_stage": 3,
            "partition_count": num_ranks,
            "optimizer_state_dict": {"state": {}, "param_groups": []},
            "fp32_flat_groups": _draw(sizes, seed=rank),
        }
        torch.save({"optimizer_state_dict": inner}, tag / f"bf16_{prefix}_optim_states.pt")


def _sub_groups(shapes: Shapes, num_ranks: int) -> Iterator[dict[str, torch.Size]]:
    group: dict[str, torch.Size] = {}
    num_elements = 0
    for name, shape in shapes.items():
        group[name] = torch.Size(shape)
        num_elements += math.ceil(math.prod(shape) / num_ranks)
        if num_elements >= SUB_GROUP_ELEMENTS:
            yield group
            group, num_elements = {}, 0
    if group:
        yield group


def _write_cut(tag: Path, shapes: Shapes, num_ranks: int, *, with_module: bool) -> None:
    """ZeRO 2: one vector cut into equal parts, filled up to a multiple of twice the ranks."""
    group = {name: torch.Size(shape) for name, shape in shapes.items()}
    module = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items() if with_module}
    torch.save(_model_state([group], module, num_ranks, stage=2), tag / "mp_rank_00_model_states.pt")
    numel = sum(math.prod(shape) for shape in shapes.values())
    part = math.ceil(numel / (2 * num_ranks)) * 2
    for rank in range(num_ranks):
        inner = {
            "zero_stage": 2,
            "partition_count": [num_ranks],
            # the padding is not saved
            "single_partition_of_fp32_groups": _draw([min(part, numel - rank * part)], seed=rank),
            "base_optimizer_state": {"state": {}, "param_groups": []},
            "group_paddings": [part * num_ranks - numel if rank == num_ranks - 1 else 0],
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": inner}, tag / name)


def _draw(sizes: list[int], *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(size).normal_(std=DEVIATION, generator=generator) for size in sizes]


def _model_state(
    groups: list[dict[str, torch.Size]], module: Mapping[str, Tensor], num_ranks: int, *, stage: int
) -> dict[str, Any]:
    return {
        "module": module,
        "buffer_names": [],
        "param_shapes": groups,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "global_steps": 1000,
        "dp_world_size": num_ranks,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": "0.19.8",
    }
