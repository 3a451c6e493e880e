"""From the scores of pairs to their labels: votes of scorers, their combination, and what human labels keep.

Legend: S scorers, P pairs. Values are about a pair's lower image, the one with the lower number in its row: label 1 if
it is the better one, 0 if the higher one is, 0.5 for a tie, NaN if unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Combination = Literal["vote", "unanimous"]
HumanUse = Literal["replace", "keep", "confirm"]


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What scorers say of pairs. label, margin, probability: (P,); NaN if the pair gets no label.

    margin: of a single scorer in its own units; of several the mean, each in units of its own median margin.
    """

    label: NDArray[np.float64]
    margin: NDArray[np.float64]
    probability: NDArray[np.float64]


def votes(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the label that each margin gives: 1 above 0, 0 below, 0.5 at 0, NaN for NaN."""
    return np.where(np.isnan(margins), np.nan, np.where(margins == 0, 0.5, margins > 0))


def common_margin(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return one margin a pair, (P,), from those of the scorers, (S, P); NaN if a scorer has none."""
    if len(margins) == 1:
        return margins[0]
    return np.mean([row / _median_size(row) for row in margins], axis=0)


def _median_size(margins: NDArray[np.float64]) -> float:
    sizes = np.abs(margins[~np.isnan(margins) & (margins != 0)])
    return float(np.median(sizes)) if len(sizes) else 1.0


def combine(
    margins: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    *,
    combination: Combination,
    least_margin: float = 0.0,
) -> Verdicts:
    """Return one verdict a pair. margins, probabilities: (S, P), by scorer; a pair needs those of all scorers.

    vote: the side with the larger sum of votes; the probability is the mean of the scorers'. unanimous: the same, but
    pairs on which scorers disagree get no label. Pairs with a smaller margin than least_margin get none either.
    """
    each = votes(margins)
    share = each.mean(axis=0)
    margin = common_margin(margins)
    is_left_out = np.isnan(share) | (np.abs(margin) < least_margin)
    if combination == "unanimous":
        is_left_out |= (each != each[0]).any(axis=0)
    label = np.where(share == 0.5, 0.5, share > 0.5)
    return Verdicts(
        label=np.where(is_left_out, np.nan, label),
        margin=margin,
        probability=np.where(is_left_out, np.nan, probabilities.mean(axis=0)),
    )


def with_human_labels(found: Verdicts, human: NDArray[np.float64], use: HumanUse) -> Verdicts:
    """Return verdicts after human labels, (P,), have had their say.

    replace: the scorers' verdict stands. keep: a decided human label stays, with probability 1, and the scorers decide
    the others. confirm: only pairs on which both agree get a label.
    """
    is_decided = (human == 1) | (human == 0)
    if use == "keep":
        return Verdicts(
            label=np.where(is_decided, human, found.label),
            margin=found.margin,
            probability=np.where(is_decided, human, found.probability),
        )
    if use == "confirm":
        is_confirmed = is_decided & (found.label == human)
        return Verdicts(
            label=np.where(is_confirmed, found.label, np.nan),
            margin=found.margin,
            probability=np.where(is_confirmed, found.probability, np.nan),
        )
    return found
