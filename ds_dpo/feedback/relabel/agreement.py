"""How far labels of scorers agree with those of people, and with each other.

Legend: S scorers, P pairs; labels are 1, 0, 0.5 for a tie and NaN for none, about the lower image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DECILES = 10


@dataclass(frozen=True, kw_only=True)
class MarginDecile:
    """Pairs of like margin. low, high: least and largest size of margin among them. accuracy: as in Agreement."""

    low: float
    high: float
    pairs: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Labels against human ones. pairs: number with a decided human label and any other one.

    accuracy: share of these with the same label, a tie counts half. kappa: Cohen's, over pairs that both decide; None
    if there are none or chance alone would give full agreement. deciles: by size of margin, smallest first; fewer if
    there are fewer than 10 pairs.
    """

    pairs: int
    accuracy: float | None
    kappa: float | None
    deciles: Sequence[MarginDecile]


def agreement(labels: NDArray[np.float64], human: NDArray[np.float64], margins: NDArray[np.float64]) -> Agreement:
    """Compare labels with human ones, both (P,). margins: (P,), whose size says how sure the labels are."""
    is_compared = ~np.isnan(labels) & ((human == 1) | (human == 0))
    own, other, size = labels[is_compared], human[is_compared], np.abs(margins[is_compared])
    is_right = np.where(own == 0.5, 0.5, own == other)
    order = np.argsort(size, kind="stable")
    parts = [part for part in np.array_split(order, DECILES) if len(part)]
    return Agreement(
        pairs=len(own),
        accuracy=float(is_right.mean()) if len(own) else None,
        kappa=kappa(own, other),
        deciles=[
            MarginDecile(
                low=float(size[part].min()),
                high=float(size[part].max()),
                pairs=len(part),
                accuracy=float(is_right[part].mean()),
            )
            for part in parts
        ],
    )


def kappa(labels: NDArray[np.float64], others: NDArray[np.float64]) -> float | None:
    """Return Cohen's kappa of two raters' labels, (P,) each, over the pairs that both decide.

    Source: Cohen, Educational and Psychological Measurement 20 (1960).
    """
    both = (labels != 0.5) & (others != 0.5) & ~np.isnan(labels) & ~np.isnan(others)
    own, other = labels[both], others[both]
    if not len(own):
        return None
    observed = float((own == other).mean())
    by_chance = float(own.mean() * other.mean() + (1 - own.mean()) * (1 - other.mean()))
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def unanimous_share(labels: NDArray[np.float64]) -> float | None:
    """Return the share of pairs on which all scorers agree, (S, P), among those that all have labelled."""
    whole = labels[:, ~np.isnan(labels).any(axis=0)]
    return float((whole == whole[0]).all(axis=0).mean()) if whole.shape[1] else None


def agreement_matrix(labels: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, float | None]]:
    """Return the share of equal labels for each two scorers, by name, among pairs that both have labelled."""
    return {
        name: {other: _equal_share(labels[name], labels[other]) for other in labels if other != name} for name in labels
    }


def _equal_share(own: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    both = ~np.isnan(own) & ~np.isnan(other)
    return float((own[both] == other[both]).mean()) if both.any() else None
