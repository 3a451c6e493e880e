"""A small SDXL pipeline, and the same as one file under the names of Stability's own code, as A1111 has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ds_dpo.evaluation.drawing.live_pipeline import build_pipeline
from ds_dpo.miniature.models import make_scheduler, make_text_parts, make_vae
from ds_dpo.models.weights.ldm_keys import ldm_names

OPEN_CLIP = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)
VAE = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."),
)


def small_sdxl() -> StableDiffusionXLPipeline:
    """An untrained SDXL whose two text encoders differ in width, by which their weights in a single file are told."""
    torch.manual_seed(0)
    text = make_text_parts()
    wide = CLIPTextConfig(**{**text.encoder_2.config.to_dict(), "hidden_size": 64, "projection_dim": 64})
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=48 + 64,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )
    return build_pipeline(
        denoiser=unet.eval(),
        vae=make_vae().eval(),
        scheduler=make_scheduler(),
        tokenizers=(text.tokenizer, text.tokenizer_2),
        text_encoders=(text.encoder.eval(), CLIPTextModelWithProjection(wide).eval()),
    )


def write_whole_file(pipeline: StableDiffusionXLPipeline, path: Path) -> None:
    """Write UNet, text encoders and VAE into one file."""
    unet = pipeline.unet.state_dict()
    names = ldm_names(unet, pipeline.unet.config)
    others = encoders_in_file(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae)
    tensors = {**{names[name]: value for name, value in unet.items()}, **others}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def encoders_in_file(first: nn.Module, second: nn.Module, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return the tensors of two text encoders and a VAE by their names in one file of SDXL."""
    first_weights = {name.removeprefix("text_model."): value for name, value in first.state_dict().items()}
    blocks = len(vae.config.block_out_channels)
    return {
        **{f"conditioner.embedders.0.transformer.text_model.{name}": value for name, value in first_weights.items()},
        **{f"conditioner.embedders.1.model.{name}": value for name, value in _open_clip(second.state_dict())},
        **{f"first_stage_model.{_vae_name(name, blocks)}": value for name, value in vae.state_dict().items()},
    }


def _open_clip(weights: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in weights.items():
        if name == "text_projection.weight":
            found.append(("text_projection", value.T))
        elif match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found.append((f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}", torch.cat(parts)))
        elif not re.search(r"self_attn\.[kv]_proj", name):
            found.append((_renamed(name, OPEN_CLIP), value))
    return found


def _vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", name)
    return _renamed(name, VAE)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
