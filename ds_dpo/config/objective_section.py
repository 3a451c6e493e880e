"""What every objective's section of the run configuration has, and automatic beta, which two of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, identity_field

# What an objective needs of the reference: nothing, two errors a pair, or its predictions.
ReferenceNeed = Literal["none", "errors", "predictions"]

# Automatic beta stays within beta / 10 and 10 beta unless the run says otherwise.
BETA_RANGE = 10.0
GAP_DECAY = 0.9

# Ends of the formulas' sentences.
DIFFERENCE = (
    "difference = (policy - reference) error of the chosen image minus that of the rejected; an error is a mean of "
    "squares over the latent's elements"
)
ERROR = "an error is a mean of squares over the latent's elements; no reference"


def beta_field() -> Any:
    """The same in every objective that has one."""
    return identity_field(
        "pull towards the reference, in the authors' unit: 1/2 beta is the factor of the difference between the "
        "policy's and the reference's mean squared error",
        gt=0,
    )


class ObjectiveSection(Section):
    """All that is known of an objective without torch; its fields are the loss's keyword arguments.

    title: what a model card calls it. paper: its address; None where there is none. builds_on_dpo: its loss is a
    function of Diffusion-DPO's logit, so a model card cites that paper too. recipe_group: objectives of one group are
    compared with each other's recipes; None: with its own alone. takes_soft_targets: a label may be a probability.
    statistic_fields: fields that are no arguments of the loss, but options of the statistic that changes some of them.
    also_named: names of its fields in other training scripts.
    """

    title: ClassVar[str]
    paper: ClassVar[str | None]
    builds_on_dpo: ClassVar[bool] = False
    recipe_group: ClassVar[str | None] = None
    reference_need: ClassVar[ReferenceNeed] = "errors"
    takes_soft_targets: ClassVar[bool] = False
    statistic_fields: ClassVar[frozenset[str]] = frozenset()
    also_named: ClassVar[Mapping[str, str]] = {}
    type: str

    @abstractmethod
    def formula(self) -> str:
        """Return the loss in words, with this run's numbers."""

    @classmethod
    def name(cls) -> str:
        """Return the value of objective.type that chooses this objective."""
        return str(cls.model_fields["type"].default)

    def loss_options(self) -> dict[str, Any]:
        """Return the loss's keyword arguments as configured."""
        return self.model_dump(exclude={"type", *self.statistic_fields})

    def sentences(self) -> list[str]:
        """Return what a start prints of the objective, a line each."""
        return [f"objective: {self.formula()}"]


class AutomaticBetaFields(ObjectiveSection):
    """Beta, which may follow the gaps of the steps before."""

    statistic_fields: ClassVar[frozenset[str]] = frozenset(
        {"target_gradient_factor", "beta_min", "beta_max", "gap_decay"}
    )
    beta: float = beta_field()
    target_gradient_factor: float | None = identity_field(
        "automatic beta, from the given one on: a pair with the mean |difference| of the steps before then pulls with "
        "this share of its gradient, sigmoid(-u); none: beta is fixed",
        default=None,
        gt=0,
        lt=0.5,
    )
    beta_min: float | None = identity_field("least automatic beta; none: a tenth of beta", default=None, gt=0)
    beta_max: float | None = identity_field("largest automatic beta; none: 10 x beta", default=None, gt=0)
    gap_decay: float = identity_field(
        "share of automatic beta's running mean that a step keeps; 0: the last step alone",
        default=GAP_DECAY,
        ge=0,
        lt=1,
    )

    @property
    def beta_bounds(self) -> tuple[float, float]:
        """Between which automatic beta stays."""
        least = self.beta / BETA_RANGE if self.beta_min is None else self.beta_min
        return least, self.beta * BETA_RANGE if self.beta_max is None else self.beta_max

    def sentences(self) -> list[str]:
        """Add a line on automatic beta, where it is on."""
        if self.target_gradient_factor is None:
            return super().sentences()
        least, largest = self.beta_bounds
        return [
            *super().sentences(),
            f"automatic beta: from {self.beta:g} on it follows the mean |difference| of the steps before, within "
            f"{least:g} and {largest:g}, so that a pair with that difference has {self.target_gradient_factor:g} of "
            "its gradient left",
        ]

    @model_validator(mode="after")
    def bounds_are_of_an_automatic_beta(self) -> AutomaticBetaFields:
        if self.target_gradient_factor is None:
            ignored = {"beta_min": self.beta_min, "beta_max": self.beta_max}
            if self.gap_decay != GAP_DECAY:
                ignored["gap_decay"] = self.gap_decay
            for name, value in ignored.items():
                if value is not None:
                    raise ValueError(
                        f"objective.{name} {value:g} has no effect on a fixed beta; give target_gradient_factor too, "
                        "such as 0.2"
                    )
        least, largest = self.beta_bounds
        if not least <= self.beta <= largest:
            raise ValueError(
                f"objective.beta {self.beta:g}, where automatic beta starts, is not within beta_min {least:g} and "
                f"beta_max {largest:g}"
            )
        return self
