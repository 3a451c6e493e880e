"""FLUX.1: a transformer of double and single blocks, CLIP's pooled text and T5, and latents of 16 channels."""

from __future__ import annotations

from ds_dpo.models.denoiser.predict import FLUX_PACKING, predict_by_flux_transformer
from ds_dpo.models.families.clip import clip_part
from ds_dpo.models.families.family import DenoiserKind, Family, Published, TextPart, any_of_its_class, refused
from ds_dpo.models.families.text import encode_flux1
from ds_dpo.models.weights.flux1_keys import flux1_in_file
from ds_dpo.models.weights.flux1_shapes import flux1_shapes
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX
from ds_dpo.models.weights.ldm_parts import same_names

# the default of diffusers' FluxPipeline, and FLUX.1-dev's own; Black Forest Labs' code gives schnell 256
T5_TOKENS = 512
NO_SINGLE_FILE = (
    "of single files of FLUX.1 only the transformer is read, as model.denoiser_init; give a diffusers folder"
)


FLUX_TRANSFORMER = DenoiserKind(
    class_name="FluxTransformer2DModel",
    title="transformer",
    folder="transformer",
    prefix=UNET_PREFIX,
    file_beginning="double_blocks.",
    own_beginning="single_transformer_blocks.",
    file_names=refused(NO_SINGLE_FILE),
    shapes=flux1_shapes,
    derive=refused(NO_SINGLE_FILE),
    unseen_settings={},
    predict=predict_by_flux_transformer,
    in_file=flux1_in_file,
    packing=FLUX_PACKING,
)
FLUX1 = Family(
    name="flux1",
    denoiser=FLUX_TRANSFORMER,
    is_of=any_of_its_class,
    text_encoders={
        "text_encoder": clip_part(prefix="text_encoders.clip_l.transformer."),
        "text_encoder_2": TextPart(
            class_name="T5EncoderModel",
            prefix="text_encoders.t5xxl.transformer.",
            places=same_names,
            derive=refused(NO_SINGLE_FILE),
            tokenizer_class="T5TokenizerFast",
            num_tokens=T5_TOKENS,
        ),
    },
    encode=encode_flux1,
    text_tokens=T5_TOKENS,
    published=Published(
        pipeline_class="FluxPipeline",
        guidance_scale="3.5",
        hub_tag="flux",
        architecture="flux-1",
        kohya_base="flux1",
        # ComfyUI knows its flow by the names of its tensors
        prediction_taken=None,
    ),
)
