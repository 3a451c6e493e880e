"""How well raters agree beyond chance, with each other and with scorers. An outcome is 0, 0.5 (a tie) or 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two judges on the same pairs. n: pairs. same: share with the same outcome. kappa: Cohen's, None if undefined.

    It is undefined if both always give one same outcome. same is None without any pair.
    """

    one: str
    other: str
    n: int
    same: float | None
    kappa: float | None


def cohen(one: Sequence[float], other: Sequence[float], names: tuple[str, str]) -> Agreement:
    """Compare two judges' outcomes, (N,) each. Source: Cohen, Educational and Psychological Measurement 20 (1960)."""
    n = len(one)
    if n == 0:
        return Agreement(one=names[0], other=names[1], n=0, same=None, kappa=None)
    same = sum(own == theirs for own, theirs in zip(one, other, strict=True)) / n
    counts, others = Counter(one), Counter(other)
    chance = sum(counts[outcome] * others[outcome] for outcome in counts) / n**2
    return Agreement(one=names[0], other=names[1], n=n, same=same, kappa=_beyond_chance(same, chance))


def fleiss(outcomes_of_pairs: Sequence[Sequence[float]]) -> tuple[int, float | None]:
    """Return the number of pairs with two outcomes or more, and Fleiss' kappa over them, None if undefined.

    The number of outcomes may differ from pair to pair. Source: Fleiss, Psychological Bulletin 76 (1971).
    """
    rated = [outcomes for outcomes in outcomes_of_pairs if len(outcomes) > 1]
    if not rated:
        return 0, None
    total = Counter(outcome for outcomes in rated for outcome in outcomes)
    chance = sum(count**2 for count in total.values()) / total.total() ** 2
    same = sum(_share_of_equal(Counter(outcomes)) for outcomes in rated) / len(rated)
    return len(rated), _beyond_chance(same, chance)


def _share_of_equal(counts: Counter[float]) -> float:
    """Return the share of two different outcomes drawn from a pair's that are equal."""
    return sum(count * (count - 1) for count in counts.values()) / (counts.total() * (counts.total() - 1))


def _beyond_chance(same: float, chance: float) -> float | None:
    return None if chance == 1 else (same - chance) / (1 - chance)
