"""Tiny random pipelines of Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ds_dpo.miniature.flow_models import make_t5_tokenizer
from ds_dpo.miniature.models import TEXT_LENGTH, make_tokenizer

LATENT_CHANNELS = 16
VAE_FACTOR = 4
CLIP_WIDTHS, T5_WIDTH = (16, 24), 48
SHIFT = 3.0
# by the model that they are shaped like: SD3.5 has norms in its attention, SD3.5-M attends twice in its first blocks
SHAPES: dict[str, dict[str, Any]] = {
    "sd3": {"dual_attention_layers": (), "qk_norm": None},
    "sd35_medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "sd35_large": {"dual_attention_layers": (), "qk_norm": "rms_norm"},
}


def tiny_transformer(shape: str = "sd35_medium", **changes: Any) -> SD3Transformer2DModel:
    """A transformer of 3 blocks that takes latents of up to 16 x 16."""
    settings = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": sum(CLIP_WIDTHS),
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**{**settings, **SHAPES[shape], **changes})


def tiny_sd3(shape: str = "sd35_medium", *, seed: int = 0, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """A whole random pipeline; its VAE makes latents of 16 x 8 x 8 from 32 x 32 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = make_t5_tokenizer(length=512)
        tokenizers = [make_tokenizer(pad_token=pad) for pad in ("<|endoftext|>", "!")]
        clips = [
            CLIPTextModelWithProjection(clip_config(tokenizer, width)).eval()
            for tokenizer, width in zip(tokenizers, CLIP_WIDTHS, strict=True)
        ]
        return StableDiffusion3Pipeline(
            transformer=tiny_transformer(shape),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=latent_vae().eval(),
            text_encoder=clips[0],
            tokenizer=tokenizers[0],
            text_encoder_2=clips[1],
            tokenizer_2=tokenizers[1],
            text_encoder_3=t5(tokens).eval() if with_t5 else None,
            tokenizer_3=tokens if with_t5 else None,
        )


def save_tiny_sd3(folder: Path, shape: str = "sd35_medium", **options: Any) -> Path:
    """Save a tiny pipeline into a folder; see tiny_sd3."""
    tiny_sd3(shape, **options).save_pretrained(folder)
    return folder


def clip_config(tokenizer: Any, width: int) -> CLIPTextConfig:
    """Of a CLIP that reads the captions' words."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5(tokens: T5TokenizerFast) -> T5EncoderModel:
    """A random T5 of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokens),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def latent_vae(*, scaling_factor: float = 1.5305, shift_factor: float = 0.0609) -> AutoencoderKL:
    """A random VAE of 16 channels that halves sides twice."""
    channels = (16, 16, 32)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
