"""Which of the images of a prompt become pairs, from their scores.

Legend: K images of a prompt by a model, S scorers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.results import ImageRow, Results

Rule = Literal["best_worst", "all", "against"]


@dataclass(frozen=True, kw_only=True)
class FormedPair:
    """Two images of one prompt. margin: of the scorers' mean standardised scores, above 0.

    confidence: share of scorers that prefer the chosen image, a tie counts half.
    """

    prompt: str
    chosen: ImageRow
    rejected: ImageRow
    margin: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Formation:
    """The pairs of an evaluation, and what gave none. unscored_images: at least one scorer gave them no score.

    undecided: pairs that were looked at and left out: of equal scores, or of a smaller margin than asked for.
    """

    pairs: Sequence[FormedPair]
    unscored_images: int
    undecided: int


@dataclass(frozen=True)
class _Scored:
    """An image with its scores (S,), higher is better, each in units of its scorer's deviation over all images."""

    row: ImageRow
    scores: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.scores.mean())


Candidates = Iterator[tuple[_Scored, _Scored]]


def form_pairs(results: Results, *, rule: Rule, least_margin: float = 0.0, against: str | None = None) -> Formation:
    """Return the pairs that a rule makes of each prompt's images, in the order of the prompts.

    best_worst: a model's best image and its worst. all: each two images of a model. against: a model's best image and
    the other model's image, `against`, of the same seed. Pairs of a smaller margin than least_margin are left out.
    Raises ConfigError if the rule lacks images or a model.
    """
    _require_what_the_rule_needs(results, rule, against)
    scored, unscored = _scored_images(results)
    pairs: list[FormedPair] = []
    undecided = 0
    for of_prompt in scored:
        for one, other in RULES[rule](of_prompt, against):
            margin = one.mean - other.mean
            if margin == 0 or abs(margin) < least_margin:
                undecided += 1
                continue
            chosen, rejected = (one, other) if margin > 0 else (other, one)
            pairs.append(
                FormedPair(
                    prompt=results.prompts[chosen.row.prompt].prompt,
                    chosen=chosen.row,
                    rejected=rejected.row,
                    margin=abs(margin),
                    confidence=_share_of_votes(chosen.scores - rejected.scores),
                )
            )
    return Formation(pairs=pairs, unscored_images=unscored, undecided=undecided)


def _require_what_the_rule_needs(results: Results, rule: Rule, against: str | None) -> None:
    labels = [model.label for model in results.models]
    seeds = results.settings.get("seeds")
    if rule != "against" and isinstance(seeds, int) and seeds < 2:
        raise ConfigError(f"--pairs {rule}: --seeds {seeds} draws one image of each prompt; give 2 or more")
    if rule == "against" and (against not in labels or len(labels) < 2):
        raise ConfigError(
            f"--pairs against: needs two models, one of them named by --against; there are {', '.join(labels)}"
        )


def _scored_images(results: Results) -> tuple[list[dict[str, list[_Scored]]], int]:
    """Return each prompt's images by model, and the number of images without a score of each scorer."""
    signs = np.array([1.0 if scorer.higher_is_better else -1.0 for scorer in results.scorers])
    names = [scorer.name for scorer in results.scorers]
    table = np.array([[_number(image.scores.get(name)) for name in names] for image in results.images])
    table = signs * table.reshape(len(results.images), len(names))
    is_whole = ~np.isnan(table).any(axis=1)
    deviation = table[is_whole].std(axis=0) if is_whole.any() else np.ones(len(names))
    table /= np.where(deviation == 0, 1, deviation)
    by_prompt: list[dict[str, list[_Scored]]] = [{} for _ in results.prompts]
    for image, scores, has_all in zip(results.images, table, is_whole, strict=True):
        if has_all:
            by_prompt[image.prompt].setdefault(image.model, []).append(_Scored(image, scores))
    return by_prompt, int((~is_whole).sum())


def _number(score: float | None) -> float:
    return math.nan if score is None else score


def _best_worst(images: Mapping[str, Sequence[_Scored]], against: str | None) -> Candidates:
    for of_model in images.values():
        if len(of_model) > 1:
            # with equal scores the image of the lower seed is the best, and that of the higher one the worst
            yield max(of_model, key=lambda one: one.mean), min(reversed(of_model), key=lambda one: one.mean)


def _all(images: Mapping[str, Sequence[_Scored]], against: str | None) -> Candidates:
    for of_model in images.values():
        yield from combinations(of_model, 2)


def _best_against(images: Mapping[str, Sequence[_Scored]], against: str | None) -> Candidates:
    rivals = {one.row.seed: one for one in images.get(against or "", [])}
    for label, of_model in images.items():
        if label != against and of_model:
            best = max(of_model, key=lambda one: one.mean)
            if best.row.seed in rivals:
                yield best, rivals[best.row.seed]


RULES: Mapping[Rule, Callable[[Mapping[str, Sequence[_Scored]], str | None], Candidates]] = {
    "best_worst": _best_worst,
    "all": _all,
    "against": _best_against,
}


def _share_of_votes(differences: NDArray[np.float64]) -> float:
    return float(np.where(differences == 0, 0.5, differences > 0).mean())
