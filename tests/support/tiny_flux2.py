"""A tiny random pipeline of FLUX.2-klein, with the real classes, and a tokenizer over the captions' words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ds_dpo.miniature.models import PROMPTS, byte_pair_tables

LATENT_CHANNELS = 8
QWEN3_WIDTH, QWEN3_DEPTH = 16, 28  # the 27th layer is read
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def tiny_transformer(**changes: Any) -> Flux2Transformer2DModel:
    """A transformer of two double and two single blocks."""
    settings = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 4, 4, 4),
        "joint_attention_dim": 3 * QWEN3_WIDTH,
        "timestep_guidance_channels": 32,
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**{**settings, **changes})


def tokenizer() -> Qwen2TokenizerFast:
    """A real Qwen2 tokenizer: letters, bytes and the words of the captions."""
    vocabulary, merges = byte_pair_tables(sorted({word for prompt in PROMPTS for word in prompt.split()}))
    return Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=[tuple(merge.split()) for merge in merges],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def tiny_flux2(*, seed: int = 0) -> Flux2KleinPipeline:
    """A whole random pipeline; its VAE makes latents of 8 x 8 x 8, or 16 tokens, from 32 x 32 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = tokenizer()
        return Flux2KleinPipeline(
            transformer=tiny_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=_vae().eval(),
            text_encoder=_qwen3(len(tokens)).eval(),
            tokenizer=tokens,
        )


def save_tiny_flux2(folder: Path, **options: Any) -> Path:
    """Save a tiny pipeline into a folder; see tiny_flux2."""
    tiny_flux2(**options).save_pretrained(folder)
    return folder


def _qwen3(vocabulary: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=QWEN3_WIDTH,
            intermediate_size=32,
            num_hidden_layers=QWEN3_DEPTH,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def _vae() -> AutoencoderKLFlux2:
    channels = (16, 16, 32)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
    )
    # means and variances as training leaves them, all different
    vae.bn.running_mean.copy_(torch.randn(4 * LATENT_CHANNELS))
    vae.bn.running_var.copy_(0.5 + torch.rand(4 * LATENT_CHANNELS))
    return vae
