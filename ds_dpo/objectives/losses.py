"""Preference objectives: functions from errors of pairs to one loss per pair, without ranks, logs or configuration.

Legend: B pairs; errors and differences as in pair_errors. In formulas, w is the chosen and l the rejected image, m the
policy's error, r the reference's, D = (m_w - r_w) - (m_l - r_l) the gap, and u = -beta/2 D, so that beta has one unit
everywhere: that of the authors' code (SalesforceAIResearch/DiffusionDPO). p is a pair's target probability: that its
chosen image is the better one.

To add an objective, write a class in config/objectives.py whose fields are the loss's keyword arguments, the loss and
its row in OBJECTIVES here, and a test against numbers derived by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ds_dpo.config.objective_section import ObjectiveSection, ReferenceNeed
from ds_dpo.config.objectives import (
    AlphaConfig,
    DmpoConfig,
    DpoConfig,
    DspoConfig,
    HingeConfig,
    IpoConfig,
    KtoConfig,
    LinearConfig,
    MapoConfig,
    OrpoConfig,
    PolyConfig,
    SdpoConfig,
    SftConfig,
)
from ds_dpo.objectives.kto_utilities import UTILITIES
from ds_dpo.objectives.logit import expected_over_labels, preference_logit
from ds_dpo.objectives.pair_errors import PairErrors
from ds_dpo.objectives.reweighted import alpha, alpha_quantities, linear, linear_quantities, poly_term
from ds_dpo.objectives.statistics import AutomaticBeta, KtoBaseline, MeanProbability, ObjectiveStatistic

__all__ = ["OBJECTIVES", "Objective", "PairErrors", "with_terms"]


# ---- with a reference ----


def dpo(errors: PairErrors, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Diffusion-DPO loss of each pair, (B,): -log sigmoid(-beta/2 ((m_w - r_w) - (m_l - r_l))).

    beta: inverse temperature on mean errors, 2000 to 5000 in the authors' runs. label_smoothing: assumed
    share of wrong labels, 0 to 0.5 (cDPO). A pair whose target probability p is below 1, such as a tie with 0.5,
    has the cross-entropy with p: the loss of the swapped pair gets the weight 1 - p.
    Source: arXiv:2311.12908, with the factor 1/2 of the authors' code (SalesforceAIResearch/DiffusionDPO, train.py).
    """
    logit = preference_logit(errors, beta=beta)
    target = errors.target_probability
    swapped_share = (1 - target) * (1 - label_smoothing) + target * label_smoothing
    return -(1 - swapped_share) * logsigmoid(logit) - swapped_share * logsigmoid(-logit)


def ipo(errors: PairErrors, *, beta: float) -> Tensor:
    """IPO loss of each pair, (B,): p (u - 1/2)^2 + (1 - p) (u + 1/2)^2, smallest at u = p - 1/2.

    The paper's (h - 1/(2 tau))^2 with tau = beta and u = beta h, times beta^2: the gradient at u = 0 is then -1, twice
    dpo's, at any beta, so that one learning rate suits both.
    Source: arXiv:2310.12036, eq. 17.
    """
    logit = preference_logit(errors, beta=beta)
    return expected_over_labels(errors, (logit - 0.5).square(), (logit + 0.5).square())


def hinge(errors: PairErrors, *, beta: float) -> Tensor:
    """Hinge loss of each pair, (B,): p max(0, 1 - u) + (1 - p) max(0, 1 + u); a pair with u above 1 has no gradient.

    Source: arXiv:2305.10425 (SLiC-HF), eq. 2, on dpo's logit as in huggingface/diffusers, train_diffusion_dpo.py.
    """
    logit = preference_logit(errors, beta=beta)
    return expected_over_labels(errors, relu(1 - logit), relu(1 + logit))


def dmpo(errors: PairErrors, *, beta: float, alpha: float = 0.01) -> Tensor:
    """DMPO loss of each pair, (B,): KL(Bernoulli(sigmoid(u)) || Bernoulli(q)), with q the label's probability.

    q = 1 - alpha for a certain label, p (1 - alpha) + (1 - p) alpha for an uncertain one; the smallest loss is 0, at
    sigmoid(u) = q. The gradient by u is s (1 - s) (u - logit q), s = sigmoid(u): it vanishes on both sides.
    Source: arXiv:2507.07510, as in AIDC-AI/Diffusion-SDPO, train.py.
    """
    logit = preference_logit(errors, beta=beta)
    target = errors.target_probability
    right = target * (1 - alpha) + (1 - target) * alpha
    wrong = target * alpha + (1 - target) * (1 - alpha)
    # sigmoid(-u), its logarithm and `wrong` are computed directly, not as 1 - the other: exact in both tails
    preferred = torch.sigmoid(logit) * (logsigmoid(logit) - right.log())
    dispreferred = torch.sigmoid(-logit) * (logsigmoid(-logit) - wrong.log())
    return preferred + dispreferred


def poly(errors: PairErrors, *, beta: float, poly_weight: float = 1.0) -> Tensor:
    """Poly-DPO loss of each pair, (B,): dpo's plus poly_weight (1 - sigmoid(u)), the authors' alpha as poly_weight.

    The gradient by u is -(1 - s)(1 + poly_weight s), s = sigmoid(u): above 0 it is larger than dpo's, and most so for
    pairs of which the policy is unsure; below 0 it is smaller. poly_weight: at least -1. 0 is dpo, to the bit.
    Source: arXiv:2604.24953; the formula is on liming-ai.github.io/ViPO.
    """
    return dpo(errors, beta=beta) + poly_weight * poly_term(errors, beta=beta)


def sdpo(errors: PairErrors, *, beta: float, mu: float = 0.6) -> Tensor:
    """Diffusion-SDPO loss of each pair, (B,): dpo with its gradient through the rejected image times lambda.

    Source: arXiv:2511.03317; the authors' code has one lambda for all pairs that a rank holds at once.
    """
    held = errors.rejected_difference
    constant = held.detach()
    scaled = constant + rejected_gradient_scale(errors, mu=mu) * (held - constant)
    return dpo(errors.with_quantity("rejected_difference", scaled), beta=beta)


def rejected_gradient_scale(errors: PairErrors, *, mu: float) -> Tensor:
    """Return sdpo's lambda of each pair, (B,) in 0..1, without gradient.

    With a and b the gradients of the chosen and the rejected error by the prediction, a step along -a + lambda b leaves
    at least mu of the chosen image's own descent: lambda = min(1, (1 - mu) |a|^2 / (a . b)) if a . b > 0, else 1.
    |a|^2 / (a . b) is m_w / residual_product.
    """
    product = errors.residual_product
    opposes = product > 0
    largest = (1 - mu) * errors.policy_chosen_error.detach() / torch.where(opposes, product, 1.0)
    return torch.where(opposes, largest, 1.0).clamp(0, 1)


def kto(
    errors: PairErrors,
    *,
    beta: float,
    utility: str = "sigmoid",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    baseline: float = 0.0,
) -> Tensor:
    """Diffusion-KTO loss of each pair, (B,): the mean of both images' weight x (1 - utility(beta/2 (g - baseline))).

    g = r - m is how far the policy has moved towards an image; the chosen one is desirable, the rejected one not.
    utility: a name in kto_utilities.UTILITIES. baseline: the mean of g over the previous step, at least 0
    (statistics.KtoBaseline).
    Source: arXiv:2404.04465; jacklishufan/diffusion-kto has no 1/2, so its beta 1000 is 2000 here.
    """
    worth = UTILITIES[utility]
    chosen = worth(0.5 * beta * (-errors.chosen_difference - baseline), 1)
    rejected = worth(0.5 * beta * (-errors.rejected_difference - baseline), -1)
    return 0.5 * (desirable_weight * (1 - chosen) + undesirable_weight * (1 - rejected))


def dspo(errors: PairErrors, *, beta: float, shift: float | None = None) -> Tensor:
    """DSPO loss of each pair, (B,): mean of (p_w - t_w - c (p_w - q_w))^2 with c = shift (1 - sigmoid(u)).

    p is the policy's prediction, q the reference's, t the target. shift: below 1, else the chosen image's error rises:
    the loss is smallest at p = t + c (t - q) / (1 - c). None: beta, as in the authors' code. It is computed as
    m_w - c (d + s) + c^2 s, where d = m_w - r_w and s = mean (p_w - q_w)^2, because mean (p - q)(p - t) is (d + s) / 2.
    Source: openreview.net/forum?id=xyfb9HHvMe; huaishengzhu/DSPO, train.py, its SD1.5 branch.
    """
    distance = errors.chosen_distance
    factor = (beta if shift is None else shift) * torch.sigmoid(-preference_logit(errors, beta=beta))
    return errors.policy_chosen_error - factor * (errors.chosen_difference + distance) + factor.square() * distance


# ---- without a reference ----


def mapo(
    errors: PairErrors, *, ratio_weight: float = 0.1, snr_value: float = 0.5, score_scale: float = 1000.0
) -> Tensor:
    """MaPO loss of each pair, (B,): m_w - ratio_weight log sigmoid(score_scale (f(m_w) - f(m_l))).

    f(m) = s m / (exp(s m) - 1) with s = snr_value falls from 1 as an error grows.
    Source: arXiv:2406.06424; mapo-t2i/mapo, utils.py, where score_scale is the number of training timesteps.
    """
    chosen = _score(snr_value * errors.policy_chosen_error)
    rejected = _score(snr_value * errors.policy_rejected_error)
    return errors.policy_chosen_error - ratio_weight * logsigmoid(score_scale * (chosen - rejected))


def _score(x: Tensor) -> Tensor:
    """Return x / (exp(x) - 1) for x of 0 and above, 1 at 0, with a gradient that is exact and finite everywhere."""
    is_small = x < 0.25
    # a series with Bernoulli's numbers; its next term is below 3e-14
    small = torch.where(is_small, x, 0.0)
    square = small.square()
    series = 1 - small / 2 + square * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
    # the branch that is not used must also have a finite gradient; exp(-x) does not overflow
    large = torch.where(is_small, 1.0, x)
    return torch.where(is_small, series, large * (-large).exp() / -torch.expm1(-large))


def orpo(errors: PairErrors, *, ratio_weight: float = 0.1) -> Tensor:
    """ORPO loss of each pair, (B,): m_w - ratio_weight log sigmoid(m_l - m_w), with -m as an image's log-odds.

    huggingface/diffusers' diffusion_orpo has the opposite difference, so that it also draws the policy to the rejected
    image.
    Source: arXiv:2403.07691, eq. 6 and 7; the form without a likelihood is that of diffusers' example.
    """
    return errors.policy_chosen_error - ratio_weight * logsigmoid(
        errors.policy_rejected_error - errors.policy_chosen_error
    )


def sft(errors: PairErrors) -> Tensor:
    """Supervised fine-tuning on the chosen image alone: its squared error, (B,); rejected images are not used.

    Source: arXiv:2006.11239, eq. 14, as in the --sft branch of SalesforceAIResearch/DiffusionDPO, train.py.
    """
    return errors.policy_chosen_error


def anchor(errors: PairErrors) -> Tensor:
    """Return a further term: half the sum of both images' mean squared distances between policy and reference, (B,).

    Source: anchor_alpha of bghira/SimpleTuner's Flow-DPO.
    """
    return 0.5 * (errors.chosen_distance + errors.rejected_distance)


# ---- quantities for the log ----


def dpo_quantities(errors: PairErrors, *, beta: float, label_smoothing: float = 0.0) -> Mapping[str, Tensor]:
    """Return gradient_factor: sigmoid(-u), the share of a pair's largest gradient that is left."""
    return {"gradient_factor": torch.sigmoid(-preference_logit(errors, beta=beta))}


def dspo_quantities(errors: PairErrors, *, beta: float, shift: float | None = None) -> Mapping[str, Tensor]:
    return dpo_quantities(errors, beta=beta)


def sdpo_quantities(errors: PairErrors, *, beta: float, mu: float = 0.6) -> Mapping[str, Tensor]:
    return {**dpo_quantities(errors, beta=beta), "rejected_gradient_scale": rejected_gradient_scale(errors, mu=mu)}


# ---- the table ----


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss and what it needs besides the policy's errors of the chosen images.

    loss: function of errors and keyword arguments. reference: what it needs from the reference: nothing, errors, or
    predictions, from which the distances are computed. uses_rejected: needs rejected images. uses_residual_product:
    needs sdpo's product. quantities: further quantities for the log, by name in metrics.METRICS, from the same
    arguments. statistic: sets some arguments from earlier steps.
    """

    loss: Callable[..., Tensor]
    reference: ReferenceNeed
    uses_rejected: bool = True
    uses_residual_product: bool = False
    quantities: Callable[..., Mapping[str, Tensor]] | None = None
    statistic: type[ObjectiveStatistic] | None = None

    @property
    def uses_reference(self) -> bool:
        return self.reference != "none"


def _row(config: type[ObjectiveSection], loss: Callable[..., Tensor], **more: Any) -> tuple[str, Objective]:
    """Return an objective under its name; its config class states what it needs from the reference."""
    return config.name(), Objective(loss=loss, reference=config.reference_need, **more)


OBJECTIVES: dict[str, Objective] = dict(
    [
        _row(DpoConfig, dpo, quantities=dpo_quantities, statistic=AutomaticBeta),
        _row(IpoConfig, ipo),
        _row(HingeConfig, hinge),
        _row(DmpoConfig, dmpo),
        _row(PolyConfig, poly),
        _row(AlphaConfig, alpha, quantities=alpha_quantities, statistic=MeanProbability),
        _row(LinearConfig, linear, quantities=linear_quantities),
        _row(SdpoConfig, sdpo, uses_residual_product=True, quantities=sdpo_quantities, statistic=AutomaticBeta),
        _row(KtoConfig, kto, statistic=KtoBaseline),
        _row(MapoConfig, mapo),
        _row(OrpoConfig, orpo),
        _row(DspoConfig, dspo, quantities=dspo_quantities),
        _row(SftConfig, sft, uses_rejected=False),
    ]
)


def with_terms(objective: Objective, *, sft_weight: float, anchor_weight: float) -> Objective:
    """Return an objective whose loss has further terms; an anchor needs the reference's predictions."""
    if not sft_weight and not anchor_weight:
        return objective

    def loss(errors: PairErrors, **options: Any) -> Tensor:
        total = objective.loss(errors, **options)
        if sft_weight:
            total = total + sft_weight * sft(errors)
        if anchor_weight:
            total = total + anchor_weight * anchor(errors)
        return total

    return replace(objective, loss=loss, reference="predictions" if anchor_weight else objective.reference)
