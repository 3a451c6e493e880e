"""Diffusion-DPO's logit, and the mean over both labels of a pair whose label is uncertain."""

from __future__ import annotations

from torch import Tensor

from ds_dpo.objectives.pair_errors import PairErrors


def preference_logit(errors: PairErrors, *, beta: float) -> Tensor:
    """Return u = -beta/2 D, (B,): sigmoid(u) is the policy's probability that the chosen image is the better one."""
    return -0.5 * beta * errors.difference_gap


def expected_over_labels(errors: PairErrors, of_label: Tensor, of_swapped: Tensor) -> Tensor:
    """Return the mean of a value over both possible labels, (B,), weighted with each pair's target probability."""
    return errors.target_probability * of_label + (1 - errors.target_probability) * of_swapped
