"""The objectives: a class for each, with its options, its formula in words, its title and its paper.

To add one, write a class here that joins ObjectiveConfig, a loss with its row in objectives/losses.py, and a test
against numbers derived by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ds_dpo.config.base import identity_field
from ds_dpo.config.objective_section import (
    DIFFERENCE,
    ERROR,
    AutomaticBetaFields,
    ObjectiveSection,
    ReferenceNeed,
    beta_field,
)

# In this group beta means the same, and gradients at the start differ by a factor of 2 at most.
LOGIT_GROUP = "Diffusion-DPO's logit"


class DpoConfig(AutomaticBetaFields):
    """Diffusion-DPO: -log sigmoid(u)."""

    title: ClassVar[str] = "Diffusion-DPO"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2311.12908"
    builds_on_dpo: ClassVar[bool] = True
    recipe_group: ClassVar[str | None] = LOGIT_GROUP
    takes_soft_targets: ClassVar[bool] = True
    also_named: ClassVar[Mapping[str, str]] = {"beta_dpo": "beta", "label_smoothing": "label_smoothing"}
    type: Literal["dpo"] = identity_field("Loss of preference pairs.", default="dpo")
    label_smoothing: float = identity_field(
        "Assumed share of wrong labels (conservative DPO).", default=0.0, ge=0, lt=0.5
    )

    def formula(self) -> str:
        smoothing = f", with {self.label_smoothing:g} of labels assumed wrong" if self.label_smoothing else ""
        return (
            f"dpo, beta {self.beta:g}: loss = -log sigmoid(-{self.beta / 2:g} x difference){smoothing}, where "
            f"{DIFFERENCE}"
        )


class IpoConfig(ObjectiveSection):
    """IPO: (u - 1/2)^2."""

    title: ClassVar[str] = "IPO on Diffusion-DPO's logit"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2310.12036"
    builds_on_dpo: ClassVar[bool] = True
    recipe_group: ClassVar[str | None] = LOGIT_GROUP
    takes_soft_targets: ClassVar[bool] = True
    type: Literal["ipo"] = identity_field("Loss of preference pairs.", default="ipo")
    beta: float = beta_field()

    def formula(self) -> str:
        return (
            f"ipo, beta {self.beta:g}: loss = (-{self.beta / 2:g} x difference - 1/2)^2, smallest at a difference of "
            f"-{1 / self.beta:g}, where {DIFFERENCE}"
        )


class HingeConfig(ObjectiveSection):
    """SLiC's hinge: max(0, 1 - u)."""

    title: ClassVar[str] = "the hinge loss (SLiC-HF) on Diffusion-DPO's logit"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2305.10425"
    builds_on_dpo: ClassVar[bool] = True
    recipe_group: ClassVar[str | None] = LOGIT_GROUP
    takes_soft_targets: ClassVar[bool] = True
    type: Literal["hinge"] = identity_field("Loss of preference pairs.", default="hinge")
    beta: float = beta_field()

    def formula(self) -> str:
        return (
            f"hinge, beta {self.beta:g}: loss = max(0, 1 + {self.beta / 2:g} x difference), 0 below a difference of "
            f"-{2 / self.beta:g}, where {DIFFERENCE}"
        )


class DmpoConfig(ObjectiveSection):
    """DMPO: the reverse KL divergence of the policy's preference from the label's."""

    title: ClassVar[str] = "Divergence Minimization Preference Optimization"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2507.07510"
    builds_on_dpo: ClassVar[bool] = True
    recipe_group: ClassVar[str | None] = LOGIT_GROUP
    takes_soft_targets: ClassVar[bool] = True
    also_named: ClassVar[Mapping[str, str]] = {"dmpo_alpha": "alpha"}
    type: Literal["dmpo"] = identity_field("Loss of preference pairs.", default="dmpo")
    beta: float = beta_field()
    alpha: float = identity_field(
        "Assumed probability of a wrong label: the policy should prefer the chosen image with probability 1 - alpha.",
        default=0.01,
        gt=0,
        lt=0.5,
    )

    def formula(self) -> str:
        return (
            f"dmpo, beta {self.beta:g}: loss = KL(Bernoulli(sigmoid(-{self.beta / 2:g} x difference)) || "
            f"Bernoulli({1 - self.alpha:g})), where {DIFFERENCE}"
        )


class PolyConfig(ObjectiveSection):
    """Poly-DPO: -log sigmoid(u) + a (1 - sigmoid(u))."""

    title: ClassVar[str] = "Poly-DPO"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2604.24953"
    builds_on_dpo: ClassVar[bool] = True
    recipe_group: ClassVar[str | None] = LOGIT_GROUP
    takes_soft_targets: ClassVar[bool] = True
    type: Literal["poly"] = identity_field("Loss of preference pairs.", default="poly")
    beta: float = beta_field()
    poly_weight: float = identity_field(
        "Factor of 1 - sigmoid(u), which is added to -log sigmoid(u); the paper calls it alpha. Above 0 for noisy "
        "labels, below 0 for pairs that are easily told apart, 0 for plain dpo.",
        default=1.0,
        ge=-1,
    )

    def formula(self) -> str:
        return (
            f"poly, beta {self.beta:g}: loss = -log sigmoid(-{self.beta / 2:g} x difference) + {self.poly_weight:g} x "
            f"sigmoid({self.beta / 2:g} x difference), where {DIFFERENCE}"
        )


class AlphaConfig(ObjectiveSection):
    """alpha-DPO: an alpha divergence whose a follows the mean of sigmoid(u)."""

    title: ClassVar[str] = "alpha-DPO, robust to wrong labels"
    paper: ClassVar[str | None] = "https://openreview.net/forum?id=wqbnA6PcKr"
    builds_on_dpo: ClassVar[bool] = True
    recipe_group: ClassVar[str | None] = LOGIT_GROUP
    takes_soft_targets: ClassVar[bool] = True
    also_named: ClassVar[Mapping[str, str]] = {"alpha_dpo": "alpha_scale"}
    type: Literal["alpha"] = identity_field("Loss of preference pairs.", default="alpha")
    beta: float = beta_field()
    alpha_scale: float = identity_field(
        "The exponent a is this factor times the mean of sigmoid(u) over the pairs of the previous step.",
        default=0.9999,
        gt=0,
        lt=1,
    )

    def formula(self) -> str:
        return (
            f"alpha, beta {self.beta:g}: loss = (p^a - (1 - a) - a p) / (a (a - 1)), p = sigmoid(-{self.beta / 2:g} x "
            f"difference), a = {self.alpha_scale:g} x the mean of p over the previous step, where {DIFFERENCE}"
        )


class LinearConfig(ObjectiveSection):
    """Linear-DPO: c (m_w - m_l), where the constant c is linear in the gap."""

    title: ClassVar[str] = "Linear-DPO"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2605.21123"
    builds_on_dpo: ClassVar[bool] = True
    takes_soft_targets: ClassVar[bool] = True
    also_named: ClassVar[Mapping[str, str]] = {"eta_dpo": "eta"}
    type: Literal["linear"] = identity_field("Loss of preference pairs.", default="linear")
    beta: float = beta_field()
    eta: float = identity_field(
        "Least weight of a pair, which pairs keep that the policy tells apart; the largest is 1 - eta.",
        default=0.001,
        ge=0,
        lt=0.5,
    )

    def formula(self) -> str:
        return (
            f"linear, beta {self.beta:g}: loss = c x (chosen error - rejected error), where c is the constant 1/2 + "
            f"{0.2 * self.beta:g} x difference, from {self.eta:g} to {1 - self.eta:g}, and {DIFFERENCE}"
        )


class SdpoConfig(AutomaticBetaFields):
    """Diffusion-SDPO: dpo whose push away from the rejected image spares the chosen one."""

    title: ClassVar[str] = "Diffusion-SDPO, which safeguards the preferred image"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2511.03317"
    builds_on_dpo: ClassVar[bool] = True
    recipe_group: ClassVar[str | None] = LOGIT_GROUP
    takes_soft_targets: ClassVar[bool] = True
    also_named: ClassVar[Mapping[str, str]] = {"winner_preserving_mu": "mu"}
    type: Literal["sdpo"] = identity_field("Loss of preference pairs.", default="sdpo")
    mu: float = identity_field(
        "Share of the chosen image's own descent that the rejected image's gradient must leave (1: all of it).",
        default=0.6,
        ge=0,
        le=1,
    )

    def formula(self) -> str:
        return (
            f"sdpo, beta {self.beta:g}: loss = -log sigmoid(-{self.beta / 2:g} x difference), the rejected image's "
            f"gradient scaled down until at least {self.mu:g} of the chosen image's own descent is left, where "
            f"{DIFFERENCE}"
        )


class KtoConfig(ObjectiveSection):
    """Diffusion-KTO: each image alone, desirable or undesirable."""

    title: ClassVar[str] = "Diffusion-KTO"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2404.04465"
    also_named: ClassVar[Mapping[str, str]] = {
        "halo": "utility",
        "lambda_d_kto": "desirable_weight",
        "lambda_u_kto": "undesirable_weight",
    }
    type: Literal["kto"] = identity_field("Loss of preference pairs.", default="kto")
    beta: float = beta_field()
    utility: Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"] = identity_field(
        "Utility of an image as a function of how far the policy has moved towards it.", default="sigmoid"
    )
    desirable_weight: float = identity_field("Factor of the chosen images' losses.", default=1.0, ge=0)
    undesirable_weight: float = identity_field("Factor of the rejected images' losses.", default=1.0, ge=0)

    def formula(self) -> str:
        return (
            f"kto, beta {self.beta:g}: loss = ({self.desirable_weight:g} x (1 - h of the chosen image) + "
            f"{self.undesirable_weight:g} x (1 - h of the rejected)) / 2, where h is the utility {self.utility} of "
            f"{self.beta / 2:g} x (reference - policy error - the mean of that over the previous step, if above 0); an "
            "error is a mean of squares over the latent's elements"
        )

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

    title: ClassVar[str] = "MaPO, without a reference model"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2406.06424"
    reference_need: ClassVar[ReferenceNeed] = "none"
    also_named: ClassVar[Mapping[str, str]] = {"beta_mapo": "ratio_weight", "snr_value": "snr_value"}
    type: Literal["mapo"] = identity_field("Loss of preference pairs.", default="mapo")
    ratio_weight: float = identity_field(
        "Factor of the term that separates chosen from rejected; it is added to the chosen image's error.",
        default=0.1,
        gt=0,
    )
    snr_value: float = identity_field(
        "The s in an image's score s m / (exp(s m) - 1) of its error m.", default=0.5, gt=0
    )
    score_scale: float = identity_field(
        "Factor of the difference of scores; the authors use the number of training timesteps.", default=1000.0, gt=0
    )

    def formula(self) -> str:
        s = f"{self.snr_value:g}"
        return (
            f"mapo: loss = chosen error - {self.ratio_weight:g} x log sigmoid({self.score_scale:g} x (f(chosen error) "
            f"- f(rejected error))), f(m) = {s} m / (exp({s} m) - 1); {ERROR}"
        )


class OrpoConfig(ObjectiveSection):
    """ORPO: fine-tuning on the chosen image and an odds ratio over the rejected one, without a reference."""

    title: ClassVar[str] = "ORPO on squared errors, without a reference model"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2403.07691"
    reference_need: ClassVar[ReferenceNeed] = "none"
    also_named: ClassVar[Mapping[str, str]] = {"beta_orpo": "ratio_weight"}
    type: Literal["orpo"] = identity_field("Loss of preference pairs.", default="orpo")
    ratio_weight: float = identity_field(
        "Factor of the term that separates chosen from rejected; it is added to the chosen image's error.",
        default=0.1,
        gt=0,
    )

    def formula(self) -> str:
        return (
            f"orpo: loss = chosen error - {self.ratio_weight:g} x log sigmoid(rejected error - chosen error); {ERROR}"
        )


class DspoConfig(ObjectiveSection):
    """DSPO: the chosen image's error with a target that is moved away from the reference."""

    title: ClassVar[str] = "Direct Score Preference Optimization"
    paper: ClassVar[str | None] = "https://openreview.net/forum?id=xyfb9HHvMe"
    builds_on_dpo: ClassVar[bool] = True
    reference_need: ClassVar[ReferenceNeed] = "predictions"
    type: Literal["dspo"] = identity_field("Loss of preference pairs.", default="dspo")
    beta: float = beta_field()
    shift: float | None = identity_field(
        "Factor by which the target is moved away from the reference (beta if unset, as in the authors' code).",
        default=None,
        gt=0,
        lt=1,
    )

    def formula(self) -> str:
        shift = self.beta if self.shift is None else self.shift
        return (
            f"dspo, beta {self.beta:g}: loss = mean of ((prediction - target) - c (prediction - reference's))^2 of "
            f"the chosen image, c = {shift:g} x sigmoid({self.beta / 2:g} x difference), where {DIFFERENCE}"
        )

    @model_validator(mode="after")
    def the_target_is_moved_by_less_than_the_whole_way(self) -> DspoConfig:
        if self.shift is None and self.beta >= 1:
            raise ValueError(
                f"objective.beta {self.beta:g} is also dspo's shift, and with a shift of 1 or more the chosen image's "
                "error rises; also set objective.shift, such as 0.05, or a beta below 1, such as 0.001 (SD1.5)"
            )
        return self


class SftConfig(ObjectiveSection):
    """Supervised fine-tuning on the preferred images alone; no reference, no beta."""

    title: ClassVar[str] = "fine-tuning on the preferred images alone (no preference objective)"
    paper: ClassVar[str | None] = None
    reference_need: ClassVar[ReferenceNeed] = "none"
    type: Literal["sft"] = identity_field("Loss of preference pairs.", default="sft")

    def formula(self) -> str:
        return f"sft: loss = chosen error; {ERROR}"


ObjectiveConfig = Annotated[
    DpoConfig
    | IpoConfig
    | HingeConfig
    | DmpoConfig
    | PolyConfig
    | AlphaConfig
    | LinearConfig
    | SdpoConfig
    | KtoConfig
    | MapoConfig
    | OrpoConfig
    | DspoConfig
    | SftConfig,
    Field(discriminator="type"),
]
OBJECTIVE_SECTIONS: dict[str, type[ObjectiveSection]] = {
    section.name(): section for section in get_args(get_args(ObjectiveConfig)[0])
}
