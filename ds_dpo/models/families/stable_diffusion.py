"""Stable Diffusion 1.5 and 2.1: one text encoder, and no sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_dpo.models.families.clip import clip_part, open_clip_part
from ds_dpo.models.families.family import Family, Published, TextConfig
from ds_dpo.models.families.text import encode_sd15
from ds_dpo.models.families.unet import UNET


def _is_sd15(config: Mapping[str, Any], text_config: TextConfig | None) -> bool:
    return config.get("addition_embed_type") is None and not config.get("use_linear_projection")


def _is_sd21(config: Mapping[str, Any], text_config: TextConfig | None) -> bool:
    """Return whether a UNet is SD2.1's: it projects into its transformers by a matrix, SD1.5's by a convolution."""
    return config.get("addition_embed_type") is None and bool(config.get("use_linear_projection"))


SD15 = Family(
    name="sd15",
    denoiser=UNET,
    is_of=_is_sd15,
    text_encoders={"text_encoder": clip_part(prefix="cond_stage_model.transformer.")},
    encode=encode_sd15,
    published=Published(
        pipeline_class="StableDiffusionPipeline",
        guidance_scale="7.5",
        hub_tag="stable-diffusion",
        architecture="stable-diffusion-v1",
        kohya_base="sd_v1",
    ),
)
SD21 = Family(
    name="sd21",
    denoiser=UNET,
    is_of=_is_sd21,
    text_encoders={
        "text_encoder": open_clip_part(prefix="cond_stage_model.model.", is_projected=False, unused_layers=1)
    },
    # its text encoder's config leaves out the last layer, so that the last states are the second to last ones
    encode=encode_sd15,
    unsaid_prediction="SD2.1 has two kinds; set model.prediction_type to v_prediction (SD2.1 of 768 pixels) or epsilon "
    "(SD2.1-base, of 512)",
    published=Published(
        pipeline_class="StableDiffusionPipeline",
        guidance_scale="7.5",
        hub_tag="stable-diffusion",
        architecture="stable-diffusion-v2-768-v",
        architecture_of_prediction={"epsilon": "stable-diffusion-v2-512"},
        kohya_base="sd_v2",
        is_kohya_v2=True,
        # ComfyUI goes by the spread of one norm's bias, A1111 by what the UNet predicts for noise
        prediction_taken=None,
    ),
)
