"""The UNet of Stable Diffusion 1, 2 and XL, as all its families have it."""

from __future__ import annotations

from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.weights.derived_configs import derived_unet_config
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX, ldm_names
from ds_dpo.models.weights.unet_shapes import UNSEEN_SETTINGS, known_shapes

UNET = DenoiserKind(
    class_name="UNet2DConditionModel",
    title="UNet",
    folder="unet",
    prefix=UNET_PREFIX,
    file_beginning="input_blocks.",
    own_beginning="down_blocks.",
    file_names=ldm_names,
    shapes=known_shapes,
    derive=derived_unet_config,
    unseen_settings=UNSEEN_SETTINGS,
    predict=predict_by_unet,
)
