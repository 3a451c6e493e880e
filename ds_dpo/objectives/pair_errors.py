"""The numbers of a pair that every objective is a function of.

Legend: B pairs. "Error" is an image's squared error, the mean over C,H,W, fp32. "Difference" is the policy's
error minus the reference's; below 0 means that the policy has moved towards the image. In formulas, w is the
chosen and l the rejected image, m the policy's error and r the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

NOT_ERRORS = ("target_probability",)  # fields of PairErrors that a weight of errors leaves alone


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """The errors of B pairs, each (B,) fp32; what an objective does not use is None.

    The rejected side is absent where an objective looks at chosen images alone, the differences where it has no
    reference. residual_product: mean of (policy - target of the chosen) x (policy - target of the rejected), without
    gradient: times 4 over the number of elements, the inner product of both errors' gradients by the prediction.
    chosen_distance, rejected_distance: mean of (policy - reference)^2. target_probability: that the chosen image is
    the better one, (B,); None: 1 for every pair.
    """

    policy_chosen_error: Tensor
    policy_rejected_error: Tensor | None = None
    chosen_difference: Tensor | None = None
    rejected_difference: Tensor | None = None
    residual_product: Tensor | None = None
    chosen_distance: Tensor | None = None
    rejected_distance: Tensor | None = None
    target_probability: Tensor | None = None

    def weighted(self, weights: Tensor) -> PairErrors:
        """Return the same pairs with all their errors times (B,) weights; an error of exactly 0 stays so."""
        errors = {name: value for name, value in vars(self).items() if name not in NOT_ERRORS and value is not None}
        return replace(self, **{name: value * weights for name, value in errors.items()})

    @property
    def difference_gap(self) -> Tensor:
        """The chosen minus the rejected difference, (m_w - r_w) - (m_l - r_l), (B,)."""
        assert self.chosen_difference is not None
        assert self.rejected_difference is not None
        return self.chosen_difference - self.rejected_difference

    @property
    def target(self) -> Tensor | float:
        """target_probability, or 1."""
        return 1.0 if self.target_probability is None else self.target_probability
