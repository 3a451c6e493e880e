"""The sign test: is one model better on more prompts than chance would give? With its correction and sample size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

SIGNIFICANCE = 0.05
POWER = 0.8
FEWEST_PROMPTS = 6  # 5 wins of 5 have a p value of 2 / 2**5 = 0.0625, 6 of 6 have 0.03125


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p value of N prompts won and lost; prompts that are tied are left out.

    It is the probability that a fair coin gives a split at least as uneven; 1 if nothing was won or lost. Source:
    Conover, Practical Nonparametric Statistics (1999), section 3.4.
    """
    tosses, larger = wins + losses, max(wins, losses)
    tail = sum(math.comb(tosses, heads) for heads in range(larger, tosses + 1))
    return min(1.0, 2 * tail / 2**tosses)


def prompts_needed(wins: int, losses: int, ties: int) -> int | None:
    """Return the number of prompts at which a sign test at 5 % sees the difference found with 80 % probability.

    The shares of wins, losses and ties are taken as true. None if wins and losses are equal: there is no difference to
    see. It is an approximation, up to 0.07 off in power where few prompts suffice. Source: Noether, Journal of the
    American Statistical Association 82 (1987), equation 4.
    """
    if wins == losses:
        return None
    decided = wins + losses
    z = NormalDist().inv_cdf(1 - SIGNIFICANCE / 2) + NormalDist().inv_cdf(POWER)
    needed = z**2 / (4 * (wins / decided - 0.5) ** 2)
    return math.ceil(max(needed, FEWEST_PROMPTS) * (decided + ties) / decided)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number: below 0.05 with 5 % probability for any of those without an effect.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
