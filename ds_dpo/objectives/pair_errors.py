"""The errors of pairs, from which every objective is computed.

Legend: B pairs. "Error" is an image's squared error, the mean over C,H,W, fp32. "Difference" is the policy's
error minus the reference's; it is below 0 if the policy has moved towards the image. In formulas, w is the
chosen and l the rejected image, m the policy's error and r the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

# What a step computes only for objectives that ask for it.
Quantity = Literal[
    "policy_rejected_error",
    "chosen_difference",
    "rejected_difference",
    "residual_product",
    "chosen_distance",
    "rejected_distance",
]


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """The errors of B pairs, each (B,) fp32: those of the chosen images, and others that the objective asks for.

    target_probability: probability that the chosen image is the better one. asked_for: the properties read it and raise
    LookupError if a quantity is missing.
    """

    policy_chosen_error: Tensor
    target_probability: Tensor
    asked_for: Mapping[Quantity, Tensor] = field(default_factory=dict)

    @property
    def policy_rejected_error(self) -> Tensor:
        """The policy's error of the rejected image."""
        return self._quantity("policy_rejected_error")

    @property
    def chosen_difference(self) -> Tensor:
        """m_w - r_w."""
        return self._quantity("chosen_difference")

    @property
    def rejected_difference(self) -> Tensor:
        """m_l - r_l."""
        return self._quantity("rejected_difference")

    @property
    def difference_gap(self) -> Tensor:
        """The chosen minus the rejected difference, (m_w - r_w) - (m_l - r_l)."""
        return self.chosen_difference - self.rejected_difference

    @property
    def residual_product(self) -> Tensor:
        """The mean of (policy - target of the chosen) x (policy - target of the rejected), without gradient.

        Times 4 / (number of elements), it is the inner product of both errors' gradients by the prediction.
        """
        return self._quantity("residual_product")

    @property
    def chosen_distance(self) -> Tensor:
        """The mean of (policy - reference)^2 on the chosen image."""
        return self._quantity("chosen_distance")

    @property
    def rejected_distance(self) -> Tensor:
        """The mean of (policy - reference)^2 on the rejected image."""
        return self._quantity("rejected_distance")

    def weighted(self, weights: Tensor) -> PairErrors:
        """Return the same pairs with all their errors times (B,) weights; an error of exactly 0 stays so."""
        return replace(
            self,
            policy_chosen_error=self.policy_chosen_error * weights,
            asked_for={name: value * weights for name, value in self.asked_for.items()},
        )

    def with_quantity(self, name: Quantity, value: Tensor) -> PairErrors:
        """Return the same pairs with one quantity replaced."""
        return replace(self, asked_for={**self.asked_for, name: value})

    def _quantity(self, name: Quantity) -> Tensor:
        if name not in self.asked_for:
            raise LookupError(
                f"{name} was not computed; the objective's row in OBJECTIVES must ask for it (computed: "
                f"{', '.join(self.asked_for) or 'chosen errors alone'})"
            )
        return self.asked_for[name]
