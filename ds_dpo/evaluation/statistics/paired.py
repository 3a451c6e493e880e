"""Two models on the same prompts and seeds: all figures of a comparison by one scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ds_dpo.evaluation.statistics.bootstrap import RESAMPLES, Interval, bootstrap_intervals, finite_scores
from ds_dpo.evaluation.statistics.sign_test import prompts_needed, sign_test
from ds_dpo.evaluation.statistics.win_rate import of_certain_outcomes, outcomes


@dataclass(frozen=True, kw_only=True)
class PairedFigures:
    """A model against a rival. n: pairs of images. num_prompts: different prompts among them.

    win_rate: share of n that the model wins, a tie counts half. difference: of the scores, model minus rival. Both with
    95 % intervals that resample whole prompts. p_value: two-sided sign test over prompts, where a prompt is won if the
    model wins more of its images than it loses. prompts_needed: as in sign_test.
    """

    n: int
    num_prompts: int
    win_rate: Interval
    difference: Interval
    median_difference: float
    p_value: float
    prompts_needed: int | None


def compare_paired(
    scores: ArrayLike, rival_scores: ArrayLike, prompts: Sequence[str], *, resamples: int = RESAMPLES
) -> PairedFigures:
    """Compare scores (N,) of which the higher is better, with the same (prompt, seed) at the same index.

    Raises ValueError for unequal lengths, fewer than two prompts, a score that is not finite.
    """
    difference = finite_scores(scores, prompts) - finite_scores(rival_scores, prompts)
    outcome = outcomes(difference)
    rate, mean = bootstrap_intervals([outcome, difference], prompts, resamples=resamples)
    _, prompt_of_image = np.unique(np.asarray(prompts), return_inverse=True)
    balance = np.bincount(prompt_of_image, weights=2 * outcome - 1)  # wins minus losses of each prompt
    wins, losses = int((balance > 0).sum()), int((balance < 0).sum())
    ties = len(balance) - wins - losses
    return PairedFigures(
        n=len(outcome),
        num_prompts=len(balance),
        win_rate=of_certain_outcomes(rate, num_prompts=len(balance)),
        difference=mean,
        median_difference=float(np.median(difference)),
        p_value=sign_test(wins, losses),
        prompts_needed=prompts_needed(wins, losses, ties),
    )
