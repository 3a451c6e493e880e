"""Pipelines of diffusers around live parts, by the class of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn

from ds_dpo.models.sampler import Sampler


def build_pipeline(
    *,
    denoiser: nn.Module,
    vae: nn.Module,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module],
    scheduler: Sampler,
) -> DiffusionPipeline:
    """Join live parts without copying or moving them: with a UNet, two text encoders make SDXL, one Stable Diffusion 1.

    A transformer of Stable Diffusion 3 takes two CLIPs, or these and T5, one of FLUX.1 CLIP and T5, one of FLUX.2
    Qwen3. Raises ValueError for another number of text encoders or tokenizers.
    """
    if isinstance(denoiser, SD3Transformer2DModel):
        return _sd3_pipeline(denoiser, vae, tokenizers, text_encoders, scheduler)
    if isinstance(denoiser, FluxTransformer2DModel):
        return _flux_pipeline(denoiser, vae, tokenizers, text_encoders, scheduler)
    if isinstance(denoiser, Flux2Transformer2DModel):
        return _flux2_pipeline(denoiser, vae, tokenizers, text_encoders, scheduler)
    if len(text_encoders) not in (1, 2) or len(tokenizers) != len(text_encoders):
        raise ValueError(
            f"{len(text_encoders)} text encoders and {len(tokenizers)} tokenizers: a pipeline needs 1 of each "
            "(Stable Diffusion 1) or 2 of each (SDXL)"
        )
    shared = {"unet": denoiser, "vae": vae, "scheduler": scheduler}
    if len(text_encoders) == 1:
        return StableDiffusionPipeline(
            **shared,
            tokenizer=tokenizers[0],
            text_encoder=text_encoders[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        **shared,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        add_watermarker=False,
    )


def _sd3_pipeline(
    transformer: nn.Module,
    vae: nn.Module,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module],
    scheduler: Sampler,
) -> DiffusionPipeline:
    if len(text_encoders) not in (2, 3) or len(tokenizers) != len(text_encoders):
        raise ValueError(
            f"{len(text_encoders)} text encoders and {len(tokenizers)} tokenizers: a pipeline of Stable Diffusion 3 "
            "needs 3 of each, or 2 of each without T5"
        )
    absent = (None,) * (3 - len(text_encoders))
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        **dict(zip(("tokenizer", "tokenizer_2", "tokenizer_3"), (*tokenizers, *absent), strict=True)),
        **dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), (*text_encoders, *absent), strict=True)),
    )


def _flux_pipeline(
    transformer: nn.Module,
    vae: nn.Module,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module],
    scheduler: Sampler,
) -> DiffusionPipeline:
    if len(text_encoders) != 2 or len(tokenizers) != 2:
        raise ValueError(
            f"{len(text_encoders)} text encoders and {len(tokenizers)} tokenizers: a pipeline of FLUX.1 needs 2 of each"
        )
    return FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
    )


def _flux2_pipeline(
    transformer: nn.Module,
    vae: nn.Module,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module],
    scheduler: Sampler,
) -> DiffusionPipeline:
    if len(text_encoders) != 1 or len(tokenizers) != 1:
        raise ValueError(
            f"{len(text_encoders)} text encoders and {len(tokenizers)} tokenizers: a pipeline of FLUX.2 needs 1 of each"
        )
    return Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        tokenizer=tokenizers[0],
        text_encoder=text_encoders[0],
    )
