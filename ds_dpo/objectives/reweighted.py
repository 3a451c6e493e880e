"""Losses that give the pairs of Diffusion-DPO other weights, by how sure the policy is of a label.

Legend as in losses; s = sigmoid(u) is the policy's own probability of the label.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ds_dpo.objectives.logit import expected_over_labels, preference_logit
from ds_dpo.objectives.pair_errors import PairErrors

# An exponent of 0 would divide by 0; the loss at this one is the limit's to 1e-9 relative, wherever u is below 1000.
SMALLEST_ALPHA = 1e-12
# Linear-DPO's slope of the weight by beta D; the tangent of sigmoid(beta/2 D) would have 1/8.
LINEAR_SLOPE = 0.2


def poly_term(errors: PairErrors, *, beta: float) -> Tensor:
    """Return 1 - s of each pair, (B,), the mean over both labels where a label is uncertain."""
    logit = preference_logit(errors, beta=beta)
    return expected_over_labels(errors, torch.sigmoid(-logit), torch.sigmoid(logit))


def alpha(errors: PairErrors, *, beta: float, alpha_scale: float = 0.9999, mean_probability: float = 0.5) -> Tensor:
    """alpha-DPO loss of each pair, (B,): (s^a - (1 - a) - a s) / (a (a - 1)), a = alpha_scale x mean_probability.

    The gradient by u is -(1 - s)(s^a - s) / (1 - a), which vanishes on both sides: a pair that the policy finds surely
    mislabelled has none. alpha_scale: below 1. mean_probability: the mean of s over the previous step
    (statistics.MeanProbability). a -> 0 is -log s - (1 - s), a -> 1 is s log s + 1 - s.
    Source: openreview.net/forum?id=wqbnA6PcKr; yangli-lab/Diffusion_alpha-DPO_ICLR2026, scripts/main.py.
    """
    logit = preference_logit(errors, beta=beta)
    exponent = max(alpha_scale * mean_probability, SMALLEST_ALPHA)
    return expected_over_labels(
        errors, _alpha_divergence(logit, exponent=exponent), _alpha_divergence(-logit, exponent=exponent)
    )


def _alpha_divergence(logit: Tensor, *, exponent: float) -> Tensor:
    """Return (s^a - (1 - a) - a s) / (a (a - 1)) for an exponent a above 0 and below 1, (B,), finite for every u.

    It has two forms, without the differences of nearly equal numbers that the plain one has near a = 0 and a = 1.
    """
    log_probability, wrong = logsigmoid(logit), torch.sigmoid(-logit)
    rest = 1 - exponent
    if exponent < 0.5:
        return -(torch.expm1(exponent * log_probability) / exponent + wrong) / rest
    power = (exponent * log_probability).exp()
    return (wrong + power * torch.expm1(rest * log_probability) / rest) / exponent


def alpha_quantities(
    errors: PairErrors, *, beta: float, alpha_scale: float = 0.9999, mean_probability: float = 0.5
) -> Mapping[str, Tensor]:
    """Return label_probability: s, the mean over both labels where a label is uncertain."""
    logit = preference_logit(errors, beta=beta)
    return {"label_probability": expected_over_labels(errors, torch.sigmoid(logit), torch.sigmoid(-logit))}


def linear(errors: PairErrors, *, beta: float, eta: float = 0.001) -> Tensor:
    """Linear-DPO loss of each pair, (B,): c (m_w - m_l), where c = clamp(1/2 + beta D / 5, eta, 1 - eta) is constant.

    No gradient passes through c, which is a line in place of dpo's 1 - s. eta: at least 0 and below 1/2; a pair that
    the policy tells apart keeps this weight. An uncertain label has the weight c - (1 - p), the mean over both labels.
    Source: arXiv:2605.21123; WhynotChen0105/Linear-DPO, train/train_sd_dpo.py.
    """
    weight = linear_weight(errors, beta=beta, eta=eta) - (1 - errors.target_probability)
    return weight * (errors.policy_chosen_error - errors.policy_rejected_error)


def linear_weight(errors: PairErrors, *, beta: float, eta: float) -> Tensor:
    """Return Linear-DPO's c of each pair, (B,), without gradient: 1/2 while policy and reference are equal."""
    return (0.5 + LINEAR_SLOPE * beta * errors.difference_gap.detach()).clamp(eta, 1 - eta)


def linear_quantities(errors: PairErrors, *, beta: float, eta: float = 0.001) -> Mapping[str, Tensor]:
    """Return gradient_factor: c."""
    return {"gradient_factor": linear_weight(errors, beta=beta, eta=eta)}
