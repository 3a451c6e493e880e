"""Shapes that are known without diffusers are those of diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import ds_dpo
from ds_dpo.errors import ModelError
from ds_dpo.export.denoiser import expected_shapes
from ds_dpo.models.weights.unet_shapes import known_shapes

MINIATURE = Path(ds_dpo.__file__).parent / "assets" / "miniature" / "model" / "unet" / "config.json"
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
CONFIGS = {
    "sdxl": SDXL,
    "sd15": {"cross_attention_dim": 768, "sample_size": 64},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "inpainting": {"cross_attention_dim": 768, "in_channels": 9},
    "uneven": {
        "block_out_channels": [32, 96, 64],
        "layers_per_block": [1, 3, 2],
        "transformer_layers_per_block": [1, 3, 2],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [4, 8, 2],
        "conv_in_kernel": 1,
        "conv_out_kernel": 5,
    },
    "miniature": json.loads(MINIATURE.read_text()),
}


def built_shapes(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in unet.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_known_shapes_are_those_of_diffusers(name):
    built = built_shapes(CONFIGS[name])
    assert known_shapes(CONFIGS[name]) == built
    assert expected_shapes(CONFIGS[name]) == built
    # as it is saved, with all defaults spelled out
    with torch.device("meta"):
        full = json.loads(UNet2DConditionModel.from_config(CONFIGS[name]).to_json_string())
    assert known_shapes(full) == built


@pytest.mark.parametrize(
    "change",
    [
        {"class_embed_type": "timestep"},
        {"time_cond_proj_dim": 256},
        {"resnet_time_scale_shift": "scale_shift"},
        {"only_cross_attention": [True, False, False]},
        {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]},
        {"transformer_layers_per_block": [1, 2, [1, 1]]},
        {"norm_num_groups": None},
        {"a_setting_of_tomorrow": None},
    ],
)
def test_anything_else_is_left_to_diffusers(change):
    assert known_shapes({**SDXL, **change}) is None


def test_diffusers_builds_or_refuses_the_rest():
    small = {**CONFIGS["miniature"], "time_cond_proj_dim": 16}
    assert expected_shapes(small) == built_shapes(small)
    with pytest.raises(ModelError, match="diffusers cannot build"):
        expected_shapes({**small, "block_out_channels": [32]})
