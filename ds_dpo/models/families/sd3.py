"""Stable Diffusion 3 and 3.5: a transformer of joint blocks, two CLIPs and T5, and latents of 16 channels."""

from __future__ import annotations

from ds_dpo.models.denoiser.predict import predict_by_sd3_transformer
from ds_dpo.models.families.clip import clip_part
from ds_dpo.models.families.family import (
    CLIP_TOKENS,
    DenoiserKind,
    Family,
    Published,
    TextPart,
    any_of_its_class,
    refused,
)
from ds_dpo.models.families.text import encode_sd3
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX
from ds_dpo.models.weights.ldm_parts import same_names
from ds_dpo.models.weights.sd3_keys import sd3_in_file
from ds_dpo.models.weights.sd3_shapes import sd3_shapes, sd3_tables

# of T5; the default of diffusers' StableDiffusion3Pipeline
T5_TOKENS = 256
NO_SINGLE_FILE = "of single files of SD3 only the transformer is read, as model.denoiser_init; give a diffusers folder"


SD3_TRANSFORMER = DenoiserKind(
    class_name="SD3Transformer2DModel",
    title="transformer",
    folder="transformer",
    prefix=UNET_PREFIX,
    file_beginning="joint_blocks.",
    own_beginning="transformer_blocks.",
    file_names=refused(NO_SINGLE_FILE),
    shapes=sd3_shapes,
    tables=sd3_tables,
    derive=refused(NO_SINGLE_FILE),
    unseen_settings={},
    predict=predict_by_sd3_transformer,
    in_file=sd3_in_file,
)
SD3 = Family(
    name="sd3",
    denoiser=SD3_TRANSFORMER,
    is_of=any_of_its_class,
    text_encoders={
        "text_encoder": clip_part(prefix="text_encoders.clip_l.transformer.", is_projected=True),
        "text_encoder_2": clip_part(prefix="text_encoders.clip_g.transformer.", is_projected=True),
        "text_encoder_3": TextPart(
            class_name="T5EncoderModel",
            prefix="text_encoders.t5xxl.transformer.",
            places=same_names,
            derive=refused(NO_SINGLE_FILE),
            tokenizer_class="T5TokenizerFast",
            num_tokens=T5_TOKENS,
            may_be_absent=True,
        ),
    },
    encode=encode_sd3,
    text_tokens=CLIP_TOKENS + T5_TOKENS,
    published=Published(
        pipeline_class="StableDiffusion3Pipeline",
        guidance_scale="7.0",
        hub_tag="stable-diffusion-3",
        architecture="stable-diffusion-3",
        kohya_base="sd3",
        # ComfyUI knows its flow by the names of its tensors
        prediction_taken=None,
    ),
)
