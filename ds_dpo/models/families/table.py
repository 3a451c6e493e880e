"""All model families by name, and the family of a denoiser."""

from __future__ import annotations

from ds_dpo.models.families.family import Config, Family, TextConfig
from ds_dpo.models.families.sdxl import SDXL, SDXL_REFINER
from ds_dpo.models.families.stable_diffusion import SD15, SD21

FAMILIES: dict[str, Family] = {family.name: family for family in (SDXL, SDXL_REFINER, SD15, SD21)}


def family_of(config: Config, text_config: TextConfig | None = None) -> Family | None:
    """Return the family of a denoiser's diffusers configuration; None if it is none of these.

    text_config: the configurations of the pipeline's text encoders; None in an export.
    """
    return next((family for family in FAMILIES.values() if family.is_of(config, text_config)), None)
