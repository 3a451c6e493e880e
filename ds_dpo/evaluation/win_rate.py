"""Win rates between two models with intervals: pure arithmetic on scores.

The images of one prompt are not independent, so intervals come from resampling whole prompts.
Scores, prompts: one entry per image, (N,), with the same (prompt, seed) at the same index for both models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 1000  # bounds the memory of many prompts
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over images and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


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
    own, rival = _finite(scores, prompts), _finite(rival_scores, prompts)
    difference = own - rival
    outcome = np.where(difference == 0, 0.5, difference > 0)
    interval = bootstrap_interval(outcome, prompts)
    return WinRate(
        rate=interval.mean,
        win_by_margin=float((difference > margin).mean()),
        loss_by_margin=float((difference < -margin).mean()),
        low=interval.low,
        high=interval.high,
    )


def bootstrap_interval(values: ArrayLike, prompts: Sequence[str], *, seed: int = 0) -> Interval:
    """Return the mean over images, and the percentile bootstrap interval of 10,000 resamples of the prompts.

    A resample draws the same number of prompts, with replacement, each with all its images. The same seed gives the
    same interval. Raises ValueError for unequal lengths, fewer than two prompts, a value that is not finite.
    Source: cluster bootstrap; Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    finite = _finite(values, prompts)
    names, prompt_of_image = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} prompts: an interval needs at least 2")
    sums = np.bincount(prompt_of_image, weights=finite)
    counts = np.bincount(prompt_of_image)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = generator.integers(len(names), size=(RESAMPLES_AT_ONCE, len(names)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean=float(finite.mean()), low=float(low), high=float(high))


def _finite(values: ArrayLike, prompts: Sequence[str]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(prompts),):
        raise ValueError(f"scores of shape {array.shape} for {len(prompts)} prompts: one score per image is needed")
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"score {place} is {array[place]}: every image needs a finite score")
    return array
