"""Which family a UNet is of, by its own configuration alone, as exports have no text encoder at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def family_of_config(config: Mapping[str, Any]) -> str:
    """Return sdxl, sdxl_refiner, sd15 or sd21.

    The refiner alone of SDXL's UNets has no attention at its lowest resolution, and SD2.1 projects into its
    transformers by a matrix, SD1.5 by a convolution.
    """
    if config.get("addition_embed_type") is None:
        return "sd21" if config.get("use_linear_projection") else "sd15"
    return "sdxl" if "Attn" in config["down_block_types"][-1] else "sdxl_refiner"
