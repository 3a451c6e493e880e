"""All model families by name, and the family of a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_dpo.errors import ModelError, shown
from ds_dpo.models.families.family import DenoiserKind, Family, TextConfig
from ds_dpo.models.families.flux1 import FLUX1
from ds_dpo.models.families.flux2_klein import FLUX2_KLEIN
from ds_dpo.models.families.sd3 import SD3
from ds_dpo.models.families.sdxl import SDXL, SDXL_REFINER
from ds_dpo.models.families.stable_diffusion import SD15, SD21
from ds_dpo.models.families.unet import UNET

FAMILIES: dict[str, Family] = {
    family.name: family for family in (SDXL, SDXL_REFINER, SD15, SD21, SD3, FLUX1, FLUX2_KLEIN)
}
KINDS: dict[str, DenoiserKind] = {family.denoiser.class_name: family.denoiser for family in FAMILIES.values()}


def family_of(config: Mapping[str, Any], text_config: TextConfig | None = None) -> Family | None:
    """Return the family of a denoiser's diffusers configuration, a UNet's where it names no class; None if of none.

    text_config: the configurations of the pipeline's text encoders; None in an export.
    """
    class_name = config.get("_class_name", UNET.class_name)
    of_its_class = [family for family in FAMILIES.values() if family.denoiser.class_name == class_name]
    return next((family for family in of_its_class if family.is_of(config, text_config)), None)


def kind_of(config: Mapping[str, Any]) -> DenoiserKind:
    """Return the kind of denoiser that a diffusers configuration is of; a UNet where it does not name its class.

    Raises ModelError for a class that no family has.
    """
    class_name = config.get("_class_name", UNET.class_name)
    if not isinstance(class_name, str) or class_name not in KINDS:
        raise ModelError(f"the model configuration is of {shown(class_name)}; {', '.join(KINDS)} would fit")
    return KINDS[class_name]
