"""What sets the model families apart: how prompts and sizes condition their UNets, and how a UNet tells its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ds_dpo.models.families.text import EncodedPrompts, TextTower, encode_sd15, encode_sdxl

# what the refiner is told of an image to be made better; of one to avoid 2.5. Source: diffusers'
# StableDiffusionXLImg2ImgPipeline, aesthetic_score; SalesforceAIResearch/DiffusionDPO, train.py
AESTHETIC_SCORE = 6.0
# classes by the name that diffusers gives them in every pipeline
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def sdxl_size_ids(time_ids: Tensor) -> Tensor:
    """Return what SDXL is told of N images, (N, 6) fp32: all of time_ids, (N, 6), as data.prepare.time_ids gives them.

    Source: arXiv:2307.01952, section 2.2.
    """
    return time_ids


def refiner_size_ids(time_ids: Tensor) -> Tensor:
    """Return what SDXL's refiner is told of N images, (N, 5) fp32: original height, width, crop top, left, aesthetics.

    time_ids: (N, 6), whose last two, the target's size, it is not told. Both images of a pair are given the score of
    good ones. Source: StableDiffusionXLImg2ImgPipeline._get_add_time_ids with requires_aesthetics_score.
    """
    scores = torch.full_like(time_ids[:, :1], AESTHETIC_SCORE)
    return torch.cat([time_ids[:, :4], scores], dim=1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family's parts and its conditioning.

    text_encoders: of TEXT_ENCODERS. size_ids: (N, 6) time ids into the
    num_size_ids numbers that the UNet is told; None: it is told nothing.
    """

    text_encoders: tuple[str, ...]
    encode: Callable[[Sequence[TextTower], Sequence[str]], EncodedPrompts]
    size_ids: Callable[[Tensor], Tensor] | None = None
    num_size_ids: int = 0


FAMILIES = {
    "sdxl": Family(
        text_encoders=("text_encoder", "text_encoder_2"),
        encode=encode_sdxl,
        size_ids=sdxl_size_ids,
        num_size_ids=6,
    ),
    "sdxl_refiner": Family(
        text_encoders=("text_encoder_2",),
        encode=encode_sdxl,
        size_ids=refiner_size_ids,
        num_size_ids=5,
    ),
    "sd15": Family(text_encoders=("text_encoder",), encode=encode_sd15),
    # its text encoder's config leaves out the last layer, so that the last states are those of the last but one
    "sd21": Family(text_encoders=("text_encoder",), encode=encode_sd15),
}


def family_of_unet(config: Mapping[str, Any], *, pooled_width: int | None) -> str | None:
    """Return the family that a UNet's diffusers configuration is of, None where it is of none here.

    pooled_width: of the text encoder's pooled output, None where there is none.
    """
    if config.get("addition_embed_type") is None:
        return "sd21" if config.get("use_linear_projection") else "sd15"
    if config["addition_embed_type"] != "text_time" or pooled_width is None:
        return None
    num_size_ids, rest = divmod(
        config["projection_class_embeddings_input_dim"] - pooled_width, config["addition_time_embed_dim"]
    )
    fitting = [name for name, family in FAMILIES.items() if family.num_size_ids == num_size_ids and not rest]
    return fitting[0] if fitting and num_size_ids else None
