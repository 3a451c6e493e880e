"""FLUX.1: a transformer of double and single blocks, CLIP's pooled text and T5, and latents of 16 channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.predict import FLUX_PACKING, predict_by_flux_transformer
from ds_dpo.models.families.clip import clip_part
from ds_dpo.models.families.family import DenoiserKind, Family, Published, TextConfig, TextPart
from ds_dpo.models.families.text import encode_flux1
from ds_dpo.models.weights.derived_configs import Config, Shapes
from ds_dpo.models.weights.flux1_keys import flux1_in_file
from ds_dpo.models.weights.flux1_shapes import flux1_shapes
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX
from ds_dpo.models.weights.ldm_parts import same_names

# the default of diffusers' FluxPipeline, and FLUX.1-dev's own; Black Forest Labs' code gives schnell 256
T5_TOKENS = 512
NO_SINGLE_FILE = "single files of FLUX.1 are written and not read; give a diffusers folder"


def _no_file_names(names: Iterable[str], config: Mapping[str, Any]) -> Mapping[str, str]:
    raise ModelError(NO_SINGLE_FILE)


def _no_derived_config(shapes: Shapes, usual: Config) -> Config:
    raise ModelError(NO_SINGLE_FILE)


def _is_of(config: Mapping[str, Any], text_config: TextConfig | None) -> bool:
    """Return True: its class shows a transformer of FLUX.1, of any size."""
    return True


FLUX_TRANSFORMER = DenoiserKind(
    class_name="FluxTransformer2DModel",
    title="transformer",
    folder="transformer",
    prefix=UNET_PREFIX,
    file_beginning="double_blocks.",
    own_beginning="single_transformer_blocks.",
    file_names=_no_file_names,
    shapes=flux1_shapes,
    derive=_no_derived_config,
    unseen_settings={},
    predict=predict_by_flux_transformer,
    in_file=flux1_in_file,
    packing=FLUX_PACKING,
)
FLUX1 = Family(
    name="flux1",
    denoiser=FLUX_TRANSFORMER,
    is_of=_is_of,
    text_encoders={
        "text_encoder": clip_part(prefix="text_encoders.clip_l.transformer."),
        "text_encoder_2": TextPart(
            class_name="T5EncoderModel",
            prefix="text_encoders.t5xxl.transformer.",
            places=same_names,
            derive=_no_derived_config,
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
