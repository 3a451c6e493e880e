"""FLUX.2-klein: FLUX.2's transformer without a scale of guidance, Qwen3, and a VAE that norms patches of latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_dpo.models.denoiser.predict import FLUX_PACKING, predict_by_flux2_transformer
from ds_dpo.models.families.family import DenoiserKind, Family, Published, TextConfig, TextPart, refused
from ds_dpo.models.families.text import Frame, encode_flux2_klein
from ds_dpo.models.weights.flux2_shapes import flux2_shapes
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX
from ds_dpo.models.weights.ldm_parts import same_names

QWEN3_TOKENS = 512
# as Qwen3's chat template writes a user's message that is answered without thinking
CHAT = Frame("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
NO_SINGLE_FILE = "single files of FLUX.2 are neither read nor written; take a diffusers folder"


def _is_of(config: Mapping[str, Any], text_config: TextConfig | None) -> bool:
    """Return whether it takes no scale of guidance; that of FLUX.2-dev does, by diffusers' default."""
    return config.get("guidance_embeds", True) is False


FLUX2_TRANSFORMER = DenoiserKind(
    class_name="Flux2Transformer2DModel",
    title="transformer",
    folder="transformer",
    prefix=UNET_PREFIX,
    file_beginning="double_blocks.",
    own_beginning="single_transformer_blocks.",
    file_names=refused(NO_SINGLE_FILE),
    shapes=flux2_shapes,
    derive=refused(NO_SINGLE_FILE),
    unseen_settings={},
    predict=predict_by_flux2_transformer,
    in_file=refused(f"--format single-file: {NO_SINGLE_FILE} (--format denoiser or pipeline)"),
    packing=FLUX_PACKING,
)
FLUX2_KLEIN = Family(
    name="flux2_klein",
    denoiser=FLUX2_TRANSFORMER,
    is_of=_is_of,
    text_encoders={
        "text_encoder": TextPart(
            class_name="Qwen3ForCausalLM",
            prefix="text_encoders.qwen3.",
            places=same_names,
            derive=refused(NO_SINGLE_FILE),
            tokenizer_class="Qwen2TokenizerFast",
            num_tokens=QWEN3_TOKENS,
            frame=CHAT,
        ),
    },
    encode=encode_flux2_klein,
    text_tokens=QWEN3_TOKENS,
    vae_class_name="AutoencoderKLFlux2",
    published=Published(
        pipeline_class="Flux2KleinPipeline",
        guidance_scale="4.0",
        hub_tag="flux2",
        architecture="flux-2",
        kohya_base="flux2",
        prediction_taken=None,
        reads_loras=False,
    ),
)
