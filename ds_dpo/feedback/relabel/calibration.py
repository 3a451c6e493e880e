"""From a scorer's margin to the probability that people prefer the image, fitted on pairs that people have labelled.

Legend: P pairs. margin: score of the lower image minus that of the higher one. human: 1 if people prefer the lower
image, 0 if the higher one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["temperature", "platt"]
MOST_STEPS = 100
CONVERGED = 1e-10
BINS = 10
FEWEST_PAIRS = 20


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """probability = sigmoid(slope * margin + offset). A temperature has the offset 0 and is 1 / slope."""

    slope: float
    offset: float

    def probabilities(self, margins: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability that people prefer the lower image, (P,); NaN where the margin is."""
        with np.errstate(invalid="ignore"):  # numpy warns of each NaN
            return np.exp(-np.logaddexp(0, -(self.slope * margins + self.offset)))


@dataclass(frozen=True, kw_only=True)
class CalibrationQuality:
    """How well probabilities describe labels that they were not fitted on.

    pairs: number of these. log_loss: mean, natural logarithm; 0.693 is that of a coin. error: expected calibration
    error, the mean distance of confidence and accuracy over 10 bins of equal width.
    """

    pairs: int
    log_loss: float
    error: float


def fit(margins: NDArray[np.float64], human: NDArray[np.float64], method: Method) -> Calibration:
    """Return the calibration of highest likelihood, by Newton's method on margins of unit size.

    Labels are drawn in from 0 and 1 as in Platt's paper, so that a scorer that is always right has a finite slope.
    Raises ValueError for fewer than 20 pairs, or if all margins are 0. Source: Platt, Probabilistic Outputs for Support
    Vector Machines (1999); Guo et al., arXiv:1706.04599, section 4.2, for a temperature.
    """
    if len(margins) < FEWEST_PAIRS:
        raise ValueError(f"{len(margins)} pairs have a margin and a human verdict; {FEWEST_PAIRS} are needed")
    scale = float(np.abs(margins).mean())
    if scale == 0:
        raise ValueError("all margins are 0")
    wins = human.sum()
    target = np.where(human == 1, (wins + 1) / (wins + 2), 1 / (len(human) - wins + 2))
    inputs = np.stack([margins / scale, np.ones_like(margins)])[: 2 if method == "platt" else 1]  # (1 or 2, P)
    weights = np.zeros(len(inputs))
    for _ in range(MOST_STEPS):
        chance = np.exp(-np.logaddexp(0, -(weights @ inputs)))
        gradient = inputs @ (target - chance)
        curvature = (inputs * (chance * (1 - chance))) @ inputs.T
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        # a step of Newton's may overshoot where the likelihood is flat
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < CONVERGED:
            break
    slope, offset = [*weights.tolist(), 0.0][:2]
    return Calibration(slope=slope / scale, offset=offset)


def quality(probabilities: NDArray[np.float64], human: NDArray[np.float64]) -> CalibrationQuality:
    """Return how well probabilities (P,) describe labels (P,)."""
    of_label = np.where(human == 1, probabilities, 1 - probabilities)
    confidence = np.maximum(probabilities, 1 - probabilities)
    is_right = np.where(probabilities == 0.5, 0.5, (probabilities > 0.5) == (human == 1))
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float((confidence[bins == one] - is_right[bins == one]).sum())) for one in range(BINS)]
    return CalibrationQuality(
        pairs=len(human),
        log_loss=float(-np.log(np.maximum(of_label, 1e-300)).mean()),
        error=sum(gaps) / len(human),
    )
