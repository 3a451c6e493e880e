"""A run's loss in words, with the numbers that it amounts to: what a user reads before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_dpo.config.objectives import (
    AutomaticBetaFields,
    DmpoConfig,
    DpoConfig,
    DspoConfig,
    HingeConfig,
    IpoConfig,
    KtoConfig,
    MapoConfig,
    OrpoConfig,
    SdpoConfig,
    SftConfig,
    TermsConfig,
)
from ds_dpo.config.run import RunConfig

DIFFERENCE = (
    "difference = (policy - reference) error of the chosen image minus that of the rejected; an error is a mean of "
    "squares over the latent's elements"
)
ERROR = "an error is a mean of squares over the latent's elements; no reference"


def describe_objective(config: RunConfig) -> list[str]:
    """Return a line on the loss and, where there are any, one on automatic beta and one on further terms."""
    objective = config.objective
    lines = [f"objective: {FORMULAS[objective.type](objective)}"]
    if isinstance(objective, AutomaticBetaFields) and objective.target_gradient_factor is not None:
        lines.append(_automatic_beta(objective))
    return lines + _terms(config.terms)


def _dpo(objective: DpoConfig) -> str:
    smoothing = f", {objective.label_smoothing:g} of labels taken to be wrong" if objective.label_smoothing else ""
    return (
        f"dpo, beta {objective.beta:g}: loss = -log sigmoid(-{objective.beta / 2:g} x difference){smoothing}, where "
        f"{DIFFERENCE}"
    )


def _ipo(objective: IpoConfig) -> str:
    factor, least = objective.beta / 2, 1 / objective.beta
    return (
        f"ipo, beta {objective.beta:g}: loss = (-{factor:g} x difference - 1/2)^2, least at a difference of "
        f"-{least:g}, where {DIFFERENCE}"
    )


def _hinge(objective: HingeConfig) -> str:
    factor, end = objective.beta / 2, 2 / objective.beta
    return (
        f"hinge, beta {objective.beta:g}: loss = max(0, 1 + {factor:g} x difference), 0 from a difference of "
        f"-{end:g} on, where {DIFFERENCE}"
    )


def _dmpo(objective: DmpoConfig) -> str:
    return (
        f"dmpo, beta {objective.beta:g}: loss = KL(Bernoulli(sigmoid(-{objective.beta / 2:g} x difference)) || "
        f"Bernoulli({1 - objective.alpha:g})), where {DIFFERENCE}"
    )


def _sdpo(objective: SdpoConfig) -> str:
    return (
        f"sdpo, beta {objective.beta:g}: loss = -log sigmoid(-{objective.beta / 2:g} x difference), the rejected "
        f"image's gradient scaled down until at least {objective.mu:g} of the chosen image's own descent is left, "
        f"where {DIFFERENCE}"
    )


def _kto(objective: KtoConfig) -> str:
    return (
        f"kto, beta {objective.beta:g}: loss = ({objective.desirable_weight:g} x (1 - h of the chosen image) + "
        f"{objective.undesirable_weight:g} x (1 - h of the rejected)) / 2, where h is the utility {objective.utility} "
        f"of {objective.beta / 2:g} x (reference - policy error - the mean of that over the step before, if above 0); "
        "an error is a mean of squares over the latent's elements"
    )


def _mapo(objective: MapoConfig) -> str:
    s = f"{objective.snr_value:g}"
    return (
        f"mapo: loss = chosen error - {objective.ratio_weight:g} x log sigmoid({objective.score_scale:g} x (f(chosen "
        f"error) - f(rejected error))), f(m) = {s} m / (exp({s} m) - 1); {ERROR}"
    )


def _orpo(objective: OrpoConfig) -> str:
    return (
        f"orpo: loss = chosen error - {objective.ratio_weight:g} x log sigmoid(rejected error - chosen error); {ERROR}"
    )


def _dspo(objective: DspoConfig) -> str:
    shift = objective.beta if objective.shift is None else objective.shift
    return (
        f"dspo, beta {objective.beta:g}: loss = mean of ((prediction - target) - c (prediction - reference's))^2 of "
        f"the chosen image, c = {shift:g} x sigmoid({objective.beta / 2:g} x difference), where {DIFFERENCE}"
    )


def _sft(objective: SftConfig) -> str:
    return f"sft: loss = chosen error; {ERROR}"


FORMULAS: dict[str, Callable[[Any], str]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "hinge": _hinge,
    "dmpo": _dmpo,
    "sdpo": _sdpo,
    "kto": _kto,
    "mapo": _mapo,
    "orpo": _orpo,
    "dspo": _dspo,
    "sft": _sft,
}


def _automatic_beta(objective: AutomaticBetaFields) -> str:
    least, largest = objective.beta_bounds
    return (
        f"automatic beta: from {objective.beta:g} on it follows the mean |difference| of the steps before, within "
        f"{least:g} and {largest:g}, so that a pair with that difference has {objective.target_gradient_factor:g} of "
        "its gradient left"
    )


def _terms(terms: TermsConfig) -> list[str]:
    parts = []
    if terms.sft_weight:
        parts.append(f"{terms.sft_weight:g} x chosen error")
    if terms.anchor_weight:
        parts.append(
            f"{terms.anchor_weight / 2:g} x (mean squared distance between policy and reference on the chosen image + "
            "that on the rejected)"
        )
    return [f"terms: the loss has further + {' + '.join(parts)}"] if parts else []
