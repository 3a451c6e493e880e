"""SDXL and its refiner: two text encoders or the second one alone, pooled text, and the sizes of the image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_dpo.models.families.clip import clip_part, open_clip_part
from ds_dpo.models.families.family import Family, Published, TextConfig
from ds_dpo.models.families.text import encode_sdxl
from ds_dpo.models.families.unet import UNET

# The refiner's score for an image that it should improve; 2.5 is for one that it should avoid. Source: diffusers'
# StableDiffusionXLImg2ImgPipeline, aesthetic_score; SalesforceAIResearch/DiffusionDPO, train.py
AESTHETIC_SCORE = 6.0


def sdxl_extras(time_ids: Tensor) -> dict[str, Tensor]:
    """Return the sizes that condition SDXL for N images, (N, 6) fp32: all of time_ids, (N, 6).

    Source: arXiv:2307.01952, section 2.2.
    """
    return {"time_ids": time_ids}


def refiner_extras(time_ids: Tensor) -> dict[str, Tensor]:
    """Return the sizes that condition SDXL's refiner for N images, (N, 5) fp32.

    They are original height, width, crop top, left, and an aesthetic score, which is that of good images for both
    images of a pair. time_ids: (N, 6), of which the last two, the target's size, are not used. Source:
    StableDiffusionXLImg2ImgPipeline._get_add_time_ids with requires_aesthetics_score.
    """
    scores = torch.full_like(time_ids[:, :1], AESTHETIC_SCORE)
    return {"time_ids": torch.cat([time_ids[:, :4], scores], dim=1)}


def _is_of(
    config: Mapping[str, Any], text_config: TextConfig | None, *, num_sizes: int, attends_at_the_bottom: bool
) -> bool:
    """Return whether a UNet is conditioned on pooled text and that number of sizes.

    If the pooled text's width is unknown, attention at the lowest resolution decides: of SDXL's UNets, only the refiner
    has none there.
    """
    if config.get("addition_embed_type") != "text_time":
        return False
    if text_config is None:
        return ("Attn" in config["down_block_types"][-1]) == attends_at_the_bottom
    sizes_width: int = config["projection_class_embeddings_input_dim"] - text_config("text_encoder_2")["projection_dim"]
    return sizes_width == num_sizes * config["addition_time_embed_dim"]


SDXL = Family(
    name="sdxl",
    denoiser=UNET,
    is_of=partial(_is_of, num_sizes=6, attends_at_the_bottom=True),
    text_encoders={
        "text_encoder": clip_part(prefix="conditioner.embedders.0.transformer."),
        "text_encoder_2": open_clip_part(prefix="conditioner.embedders.1.model.", is_projected=True),
    },
    encode=encode_sdxl,
    extras=sdxl_extras,
    published=Published(
        pipeline_class="StableDiffusionXLPipeline",
        guidance_scale="5.0",
        hub_tag="stable-diffusion-xl",
        architecture="stable-diffusion-xl-v1-base",
        kohya_base="sdxl_base_v1-0",
        reads_flags=True,
    ),
)
SDXL_REFINER = Family(
    name="sdxl_refiner",
    denoiser=UNET,
    is_of=partial(_is_of, num_sizes=5, attends_at_the_bottom=False),
    text_encoders={"text_encoder_2": open_clip_part(prefix="conditioner.embedders.0.model.", is_projected=True)},
    encode=encode_sdxl,
    extras=refiner_extras,
    published=Published(
        pipeline_class="StableDiffusionXLImg2ImgPipeline",
        guidance_scale="5.0",
        draw_arguments="image=IMAGE_OF_THE_BASE, ",  # it finishes what SDXL's base has drawn
        hub_tag="stable-diffusion-xl",
        architecture="stable-diffusion-xl-v1-refiner",
        kohya_base="sdxl_refiner_v1-0",
    ),
)
