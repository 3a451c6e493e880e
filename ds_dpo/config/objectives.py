"""The run configuration's sections on the loss: one class for each row of objectives.OBJECTIVES, and further terms."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ds_dpo.config.base import Section, identity_field

# What an objective must be given of the reference: nothing, two errors a pair, or its predictions.
ReferenceNeed = Literal["none", "errors", "predictions"]

# How far automatic beta may go from its start value either way, where nothing is said.
BETA_RANGE = 10.0
GAP_DECAY = 0.9


def beta_field() -> Any:
    """The same in every objective that has one."""
    return identity_field(
        "pull towards the reference, in the authors' unit: 1/2 beta is the factor of the difference between the "
        "policy's and the reference's mean squared error",
        gt=0,
    )


class ObjectiveSection(Section):
    """What any objective states of itself; its fields are the loss's keyword arguments.

    statistic_fields: those that are not, but belong to the statistic that gives arguments their present values.
    """

    takes_soft_targets: ClassVar[bool] = False
    reference_need: ClassVar[ReferenceNeed] = "errors"
    statistic_fields: ClassVar[frozenset[str]] = frozenset()
    type: str

    def loss_options(self) -> dict[str, Any]:
        """Return the loss's keyword arguments as configured."""
        return self.model_dump(exclude={"type", *self.statistic_fields})


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


class DpoConfig(AutomaticBetaFields):
    """Diffusion-DPO: -log sigmoid(u)."""

    takes_soft_targets: ClassVar[bool] = True
    type: Literal["dpo"] = identity_field("the loss", default="dpo")
    label_smoothing: float = identity_field(
        "share of labels taken to be wrong (conservative DPO)", default=0.0, ge=0, lt=0.5
    )


class IpoConfig(ObjectiveSection):
    """IPO: (u - 1/2)^2."""

    takes_soft_targets: ClassVar[bool] = True
    type: Literal["ipo"] = identity_field("the loss", default="ipo")
    beta: float = beta_field()


class HingeConfig(ObjectiveSection):
    """SLiC's hinge: max(0, 1 - u)."""

    takes_soft_targets: ClassVar[bool] = True
    type: Literal["hinge"] = identity_field("the loss", default="hinge")
    beta: float = beta_field()


class DmpoConfig(ObjectiveSection):
    """DMPO: the reverse KL divergence of the policy's preference from the label's."""

    takes_soft_targets: ClassVar[bool] = True
    type: Literal["dmpo"] = identity_field("the loss", default="dmpo")
    beta: float = beta_field()
    alpha: float = identity_field(
        "probability that a label is wrong: the policy is to prefer the chosen image with 1 - alpha",
        default=0.01,
        gt=0,
        lt=0.5,
    )


class SdpoConfig(AutomaticBetaFields):
    """Diffusion-SDPO: dpo whose pull on the rejected image spares the chosen one."""

    takes_soft_targets: ClassVar[bool] = True
    type: Literal["sdpo"] = identity_field("the loss", default="sdpo")
    mu: float = identity_field(
        "share of the chosen image's own descent that the rejected one must leave; 1: it may take nothing from it",
        default=0.6,
        ge=0,
        le=1,
    )


class KtoConfig(ObjectiveSection):
    """Diffusion-KTO: each image alone, desirable or undesirable."""

    type: Literal["kto"] = identity_field("the loss", default="kto")
    beta: float = beta_field()
    utility: Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"] = identity_field(
        "what an image is worth by how far the policy has moved towards it", default="sigmoid"
    )
    desirable_weight: float = identity_field("factor of the chosen images' losses", default=1.0, ge=0)
    undesirable_weight: float = identity_field("factor of the rejected images' losses", default=1.0, ge=0)

    @model_validator(mode="after")
    def some_images_count(self) -> KtoConfig:
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "objective.desirable_weight 0 and objective.undesirable_weight 0 leave nothing to train on; give one "
                "of them a weight above 0"
            )
        return self


class MapoConfig(ObjectiveSection):
    """MaPO: fine-tuning on the chosen image and a margin over the rejected one, without a reference."""

    reference_need: ClassVar[ReferenceNeed] = "none"
    type: Literal["mapo"] = identity_field("the loss", default="mapo")
    ratio_weight: float = identity_field(
        "factor of the term that sets chosen and rejected apart, beside the chosen image's error", default=0.1, gt=0
    )
    snr_value: float = identity_field("s in an image's score s m / (exp(s m) - 1) of its error m", default=0.5, gt=0)
    score_scale: float = identity_field(
        "factor of the difference of scores; the authors take the number of training timesteps", default=1000.0, gt=0
    )


class OrpoConfig(ObjectiveSection):
    """ORPO: fine-tuning on the chosen image and an odds ratio over the rejected one, without a reference."""

    reference_need: ClassVar[ReferenceNeed] = "none"
    type: Literal["orpo"] = identity_field("the loss", default="orpo")
    ratio_weight: float = identity_field(
        "factor of the term that sets chosen and rejected apart, beside the chosen image's error", default=0.1, gt=0
    )


class DspoConfig(ObjectiveSection):
    """DSPO: the chosen image's error with a target that is moved away from the reference."""

    reference_need: ClassVar[ReferenceNeed] = "predictions"
    type: Literal["dspo"] = identity_field("the loss", default="dspo")
    beta: float = beta_field()
    shift: float | None = identity_field(
        "how far dspo's target is moved away from the reference; none: by beta, as in the authors' code",
        default=None,
        gt=0,
        lt=1,
    )

    @model_validator(mode="after")
    def the_target_is_moved_by_less_than_the_whole_way(self) -> DspoConfig:
        if self.shift is None and self.beta >= 1:
            raise ValueError(
                f"objective.beta {self.beta:g} is dspo's shift, too, and from 1 on the chosen image's error rises; "
                "give objective.shift, such as 0.05, beside it, or a beta below 1, such as the authors' 0.001 (SD1.5)"
            )
        return self


class SftConfig(ObjectiveSection):
    """Supervised fine-tuning on the preferred images alone; no reference, no beta."""

    reference_need: ClassVar[ReferenceNeed] = "none"
    type: Literal["sft"] = identity_field("the loss", default="sft")


# A new objective's class joins here; its `type` is its row in objectives.OBJECTIVES.
ObjectiveConfig = Annotated[
    DpoConfig
    | IpoConfig
    | HingeConfig
    | DmpoConfig
    | SdpoConfig
    | KtoConfig
    | MapoConfig
    | OrpoConfig
    | DspoConfig
    | SftConfig,
    Field(discriminator="type"),
]
OBJECTIVE_SECTIONS: dict[str, type[ObjectiveSection]] = {
    section.model_fields["type"].default: section for section in get_args(get_args(ObjectiveConfig)[0])
}


class TermsConfig(Section):
    """What is added to the objective's loss of each pair."""

    sft_weight: float = identity_field("factor of the chosen image's squared error", default=0.0, ge=0)
    anchor_weight: float = identity_field(
        "factor of 1/2 the mean squared distances between policy and reference on both images", default=0.0, ge=0
    )
