"""UNet configurations of SDXL and SD 1.5, in full and tiny, and random weights for the tiny ones."""

import torch
from diffusers import UNet2DConditionModel

_SDXL_BLOCKS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    **_SDXL_BLOCKS,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_SDXL = {
    "_class_name": "UNet2DConditionModel",
    **_SDXL_BLOCKS,
    "sample_size": 8,
    "block_out_channels": [8, 16, 16],
    "norm_num_groups": 4,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
_SD15_BLOCKS = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
}
SD15 = {
    "_class_name": "UNet2DConditionModel",
    **_SD15_BLOCKS,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
}
TINY_SD15 = {
    "_class_name": "UNet2DConditionModel",
    **_SD15_BLOCKS,
    "sample_size": 8,
    "block_out_channels": [8, 8, 16, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}


def tiny_unet(config, *, seed):
    """A UNet with random weights everywhere, those that start at zero or one included."""
    unet = UNet2DConditionModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet
