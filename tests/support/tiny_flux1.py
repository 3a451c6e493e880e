"""Tiny random pipelines of FLUX.1, with the real classes: guidance-distilled as dev is, and not, as schnell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_sd3 import LATENT_CHANNELS, T5_WIDTH, clip_config, latent_vae, t5
from transformers import CLIPTextModel

from ds_dpo.miniature.flow_models import make_t5_tokenizer
from ds_dpo.miniature.models import make_tokenizer

CLIP_WIDTH = 16
SCALE, SHIFT = 0.3611, 0.1159  # of the latents of FLUX.1's VAE
# by model: whether it is given a scale of guidance, and its scheduler
SHAPES: dict[str, tuple[bool, dict[str, Any]]] = {
    "dev": (True, {"use_dynamic_shifting": True, "shift": 3.0}),
    "schnell": (False, {"use_dynamic_shifting": False, "shift": 1.0}),
}


def tiny_transformer(shape: str = "dev", **changes: Any) -> FluxTransformer2DModel:
    """A transformer of two double and two single blocks."""
    settings = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": CLIP_WIDTH,
        "guidance_embeds": SHAPES[shape][0],
    }
    return FluxTransformer2DModel(**{**settings, **changes})


def tiny_flux1(shape: str = "dev", *, seed: int = 0) -> FluxPipeline:
    """A whole random pipeline; its VAE makes latents of 16 x 8 x 8, or 16 tokens, from 32 x 32 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, tokens = make_tokenizer(pad_token="<|endoftext|>"), make_t5_tokenizer(length=512)
        return FluxPipeline(
            transformer=tiny_transformer(shape),
            scheduler=FlowMatchEulerDiscreteScheduler(**SHAPES[shape][1]),
            vae=latent_vae(scaling_factor=SCALE, shift_factor=SHIFT).eval(),
            text_encoder=CLIPTextModel(clip_config(tokenizer, CLIP_WIDTH)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=t5(tokens).eval(),
            tokenizer_2=tokens,
        )


def save_tiny_flux1(folder: Path, shape: str = "dev", **options: Any) -> Path:
    """Save a tiny pipeline into a folder; see tiny_flux1."""
    tiny_flux1(shape, **options).save_pretrained(folder)
    return folder
