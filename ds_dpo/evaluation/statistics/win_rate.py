"""Win rates between two models with intervals.

Scores, prompts: one entry per image, (N,), with the same (prompt, seed) at the same index for both models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ds_dpo.evaluation.statistics.bootstrap import CONFIDENCE, Interval, bootstrap_interval, finite_scores


@dataclass(frozen=True)
class WinRate:
    """A model against a rival, as shares of the images. low, high: 95 % bootstrap interval of rate.

    rate: share that scores higher; a tie counts half. win_by_margin, loss_by_margin: share that scores higher, or
    lower, by more than a margin.
    """

    rate: float
    win_by_margin: float
    loss_by_margin: float
    low: float
    high: float


def win_rate(scores: ArrayLike, rival_scores: ArrayLike, prompts: Sequence[str], *, margin: float) -> WinRate:
    """Compare two models image by image. A difference of exactly the margin is neither a win nor a loss by it.

    Raises ValueError for unequal lengths, fewer than two prompts, a score that is not finite, a negative margin.
    """
    if not margin >= 0:
        raise ValueError(f"margin {margin}: must be 0 or more")
    difference = finite_scores(scores, prompts) - finite_scores(rival_scores, prompts)
    outcome = outcomes(difference)
    interval = of_certain_outcomes(bootstrap_interval(outcome, prompts), num_prompts=len(set(prompts)))
    return WinRate(
        rate=interval.mean,
        win_by_margin=float((difference > margin).mean()),
        loss_by_margin=float((difference < -margin).mean()),
        low=interval.low,
        high=interval.high,
    )


def outcomes(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 for each image that wins, 0.5 for a tie, 0 for a loss."""
    return np.where(difference == 0, 0.5, difference > 0)


def of_certain_outcomes(interval: Interval, *, num_prompts: int) -> Interval:
    """Return the interval of a win rate, widened if all images won or all lost.

    Every resample of wins alone is 1, so the bootstrap would claim certainty after two prompts. The open end is then
    the exact one for prompts of which all are won: 0.025 ** (1 / num_prompts). Source: Clopper and Pearson,
    Biometrika 26 (1934).
    """
    end = ((1 - CONFIDENCE) / 2) ** (1 / num_prompts)
    if interval.mean == 1:
        return Interval(mean=1.0, low=end, high=1.0)
    if interval.mean == 0:
        return Interval(mean=0.0, low=0.0, high=1 - end)
    return interval
