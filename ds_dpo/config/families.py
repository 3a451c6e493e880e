"""The model families by name, and what a configuration may ask of each; models.families has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

FamilyName = Literal["sdxl", "sdxl_refiner", "sd15", "sd21", "sd3", "flux1", "flux2_klein"]
FAMILY_NAMES: tuple[FamilyName, ...] = get_args(FamilyName)
DEFAULT_FAMILY: FamilyName = "sdxl"


@dataclass(frozen=True, kw_only=True)
class FamilyLimits:
    """What a family is and cannot do. takes_sizes: its denoiser is conditioned on the sizes of images.

    is_flow: its models were trained as flows, not with a noise schedule. takes_guidance: some of its denoisers are
    conditioned on a scale of guidance, because they were distilled from guided predictions. undrawable: why its
    denoiser alone cannot draw validation images; None for one that can.
    """

    takes_sizes: bool
    is_flow: bool = False
    takes_guidance: bool = False
    undrawable: str | None = None


LIMITS: dict[FamilyName, FamilyLimits] = {
    "sdxl": FamilyLimits(takes_sizes=True),
    "sdxl_refiner": FamilyLimits(
        takes_sizes=True, undrawable="a refiner only finishes images that SDXL's base has begun"
    ),
    "sd15": FamilyLimits(takes_sizes=False),
    "sd21": FamilyLimits(takes_sizes=False),
    "sd3": FamilyLimits(takes_sizes=False, is_flow=True),
    "flux1": FamilyLimits(takes_sizes=False, is_flow=True, takes_guidance=True),
    "flux2_klein": FamilyLimits(takes_sizes=False, is_flow=True),
}
