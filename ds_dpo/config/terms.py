"""The section on terms that are added to the objective's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ds_dpo.config.base import Section, identity_field


class TermsConfig(Section):
    """Terms that are added to the objective's loss of each pair. also_named: names of its fields in other scripts."""

    also_named: ClassVar[Mapping[str, str]] = {"sft_loss_weight": "sft_weight", "anchor_alpha": "anchor_weight"}
    sft_weight: float = identity_field(
        "Factor of the chosen image's squared error, which is added to the loss (0: off).", default=0.0, ge=0
    )
    anchor_weight: float = identity_field(
        "Factor of half the sum of both images' mean squared distances between policy and reference, added to the loss "
        "(0: off).",
        default=0.0,
        ge=0,
    )

    def sentences(self) -> list[str]:
        """Return the line on the terms that a start prints, or no line without terms."""
        parts = []
        if self.sft_weight:
            parts.append(f"{self.sft_weight:g} x chosen error")
        if self.anchor_weight:
            parts.append(
                f"{self.anchor_weight / 2:g} x (mean squared distance between policy and reference on the chosen image "
                "+ that on the rejected)"
            )
        return [f"terms added to the loss: {' + '.join(parts)}"] if parts else []
