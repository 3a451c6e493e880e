"""Diffusion-KTO's five utilities: the value of an image as a function of how far the policy has moved towards it.

Each is a function of advantages x, (B,), above 0 if the policy has moved towards an image by more than the baseline,
and of the judgement s: +1 for a desirable image, -1 for an undesirable one. It returns the utility h, (B,); a loss is a
weight times 1 - h.
Source: arXiv:2404.04465, in the forms of --halo in jacklishufan/diffusion-kto, train_kto_sd_v1.5.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# risk_seeking_2 divides by this, as in the authors' code
EXPONENT_SCALE = 100.0
# above this, exp is replaced by its tangent: exp(89) is already infinite in fp32
LARGEST_EXPONENT = 20.0


def sigmoid(advantage: Tensor, judgement: int) -> Tensor:
    """Return the sigmoid of s x: it avoids risk in gains and seeks risk in losses, as in KTO and prospect theory."""
    return torch.sigmoid(judgement * advantage)


def loss_averse(advantage: Tensor, judgement: int) -> Tensor:
    """Return log sigmoid(s x), concave: an image's pull grows to a constant as the policy opposes the judgement."""
    return logsigmoid(judgement * advantage)


def risk_seeking_1(advantage: Tensor, judgement: int) -> Tensor:
    """Return -s log sigmoid(-x): the pull of an image, up or down, grows as the policy moves towards it."""
    return -judgement * logsigmoid(-advantage)


def risk_seeking_2(advantage: Tensor, judgement: int) -> Tensor:
    """Return s exp(x / 100) - 1, as risk_seeking_1 but without bound; beyond x = 2000 its tangent."""
    exponent = advantage / EXPONENT_SCALE
    within = torch.where(exponent < LARGEST_EXPONENT, exponent, LARGEST_EXPONENT)
    return judgement * within.exp() * (1 + (exponent - within)) - 1


def risk_seeking_3(advantage: Tensor, judgement: int) -> Tensor:
    """Return -log sigmoid(-s x), convex: an image's pull grows to a constant as the policy follows the judgement."""
    return -logsigmoid(-judgement * advantage)


UTILITIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sigmoid": sigmoid,
    "loss_averse": loss_averse,
    "risk_seeking_1": risk_seeking_1,
    "risk_seeking_2": risk_seeking_2,
    "risk_seeking_3": risk_seeking_3,
}
