"""Which layers get a low-rank layer: by name, by the end of a name, or all of a kind."""

from __future__ import annotations

import re
from collections.abc import Sequence

# by the names of layers in diffusers' UNets and transformers; the second attention of a UNet reads the text
NAMED_TARGETS: dict[str, re.Pattern[str]] = {
    "attention": re.compile(r"(^|\.)attn\d?\."),
    # in FLUX.1's single blocks the MLP is two layers beside attention, the second of which reads both
    "attention+mlp": re.compile(r"(^|\.)(attn\d?|ff|ff_context)\.|(^|\.)single_transformer_blocks\.\d+\.proj_"),
    "all": re.compile(""),
}


def is_target(layer: str, targets: Sequence[str]) -> bool:
    """Return whether a linear or convolution layer of this name is one of the targets of adapter.targets."""
    return any(_fits(layer, target) for target in targets)


def _fits(layer: str, target: str) -> bool:
    if target in NAMED_TARGETS:
        return NAMED_TARGETS[target].search(layer) is not None
    return layer == target or layer.endswith(f".{target}")
