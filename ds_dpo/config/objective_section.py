"""The base class of all objectives' sections, and automatic beta, which two of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, identity_field

# What an objective needs from the reference: nothing, two errors per pair, or its predictions.
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
    """Return the field of beta, the same in every objective that has one."""
    return identity_field(
        "Pull towards the reference, in the authors' unit: beta / 2 (0.2 beta in Linear-DPO) multiplies the "
        "difference between the policy's and the reference's mean squared error.",
        gt=0,
    )


class ObjectiveSection(Section):
    """All facts about an objective that need no torch; its fields are the loss's keyword arguments.

    title: its name in a model card. paper: the paper's address, None without one. builds_on_dpo: its loss is a function
    of Diffusion-DPO's logit, so that a model card also cites that paper. recipe_group: objectives of one group share
    recipes; None: the objective has only its own. takes_soft_targets: a label may be a probability. statistic_fields:
    fields that are not arguments of the loss, but options of the statistic that changes some arguments. also_named:
    names of its fields in other training scripts.
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
        """Return the lines on the objective that a start prints."""
        return [f"objective: {self.formula()}"]


class AutomaticBetaFields(ObjectiveSection):
    """Beta, which may follow the gaps of earlier steps."""

    statistic_fields: ClassVar[frozenset[str]] = frozenset(
        {"target_gradient_factor", "beta_min", "beta_max", "gap_decay"}
    )
    beta: float = beta_field()
    target_gradient_factor: float | None = identity_field(
        "Adapt beta during training, starting at objective.beta: a pair with the mean |difference| of earlier steps "
        "keeps this share of its gradient, sigmoid(-u) (beta is fixed if unset).",
        default=None,
        gt=0,
        lt=0.5,
    )
    beta_min: float | None = identity_field("Smallest automatic beta (a tenth of beta if unset).", default=None, gt=0)
    beta_max: float | None = identity_field("Largest automatic beta (10 x beta if unset).", default=None, gt=0)
    gap_decay: float = identity_field(
        "Share of automatic beta's running mean that each step keeps (0: only the last step counts).",
        default=GAP_DECAY,
        ge=0,
        lt=1,
    )

    @property
    def beta_bounds(self) -> tuple[float, float]:
        """The smallest and the largest automatic beta."""
        least = self.beta / BETA_RANGE if self.beta_min is None else self.beta_min
        return least, self.beta * BETA_RANGE if self.beta_max is None else self.beta_max

    def sentences(self) -> list[str]:
        """Add a line on automatic beta, if it is on."""
        if self.target_gradient_factor is None:
            return super().sentences()
        least, largest = self.beta_bounds
        return [
            *super().sentences(),
            f"automatic beta: it starts at {self.beta:g} and follows the mean |difference| of earlier steps, from "
            f"{least:g} to {largest:g}, so that a pair with that difference keeps {self.target_gradient_factor:g} of "
            "its gradient",
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
                        f"objective.{name} {value:g} has no effect on a fixed beta; also set "
                        "objective.target_gradient_factor, such as 0.2"
                    )
        least, largest = self.beta_bounds
        if not least <= self.beta <= largest:
            raise ValueError(
                f"objective.beta {self.beta:g}, at which automatic beta starts, must be from beta_min {least:g} to "
                f"beta_max {largest:g}"
            )
        return self
