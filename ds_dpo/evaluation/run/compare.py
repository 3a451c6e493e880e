"""From scores to results: each model against one of them, by scorer, prompt set and category."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ds_dpo.evaluation.comparison import comparison_of
from ds_dpo.evaluation.results import Comparison, ImageRow, PromptRow, ScorerRow
from ds_dpo.evaluation.run.prompt_sets import PromptSet
from ds_dpo.evaluation.statistics.paired import compare_paired
from ds_dpo.evaluation.statistics.sign_test import holm

ALL = "all"
FEWEST_PROMPTS = 2  # an interval resamples prompts


@dataclass(frozen=True)
class Scope:
    """Prompts that are compared together: a set, one of its categories, or all sets. places: in Results.prompts."""

    prompts: str
    category: str | None
    places: frozenset[int]


def list_scopes(sets: Sequence[PromptSet], rows: Sequence[PromptRow]) -> list[Scope]:
    """Return each set with its categories, and all sets together if there are several."""

    def places(prompt_set: str | None, category: str | None) -> frozenset[int]:
        return frozenset(
            place
            for place, row in enumerate(rows)
            if prompt_set in (None, row.prompt_set) and category in (None, row.category)
        )

    scopes = [
        Scope(each.name, category, places(each.name, category))
        for each in sets
        for category in (None, *each.categories)
    ]
    return scopes if len(sets) == 1 else [*scopes, Scope(ALL, None, places(None, None))]


def compare_models(
    labels: Sequence[str],
    against: str,
    scorers: Sequence[ScorerRow],
    scopes: Sequence[Scope],
    prompts: Sequence[PromptRow],
    images: Sequence[ImageRow],
) -> list[Comparison]:
    """Return every model's comparisons with `against`; p values are corrected over the scorers of each.

    Images without a score are left out with those that they are compared with. A scope of fewer than two prompts has
    no comparison, since no interval can be given.
    """
    by_place = {(image.model, image.prompt, image.seed): image for image in images}
    comparisons = []
    for label in labels:
        if label == against:
            continue
        own = [image for image in images if image.model == label]
        pairs = [(image, by_place[against, image.prompt, image.seed]) for image in own]
        for scope in scopes:
            inside = [pair for pair in pairs if pair[0].prompt in scope.places]
            of_scorers = [
                found
                for scorer in scorers
                if (found := _compare(scorer, scope, inside, prompts, label=label, against=against)) is not None
            ]
            adjusted = holm([each.p_value for each in of_scorers])
            comparisons += [
                dataclasses.replace(each, adjusted_p_value=value)
                for each, value in zip(of_scorers, adjusted, strict=True)
            ]
    return comparisons


def _compare(
    scorer: ScorerRow,
    scope: Scope,
    pairs: Sequence[tuple[ImageRow, ImageRow]],
    prompts: Sequence[PromptRow],
    *,
    label: str,
    against: str,
) -> Comparison | None:
    scored = [
        (image, own, rival)
        for image, other in pairs
        if (own := image.scores[scorer.name]) is not None and (rival := other.scores[scorer.name]) is not None
    ]
    names = [prompts[image.prompt].prompt for image, _, _ in scored]
    if len(set(names)) < FEWEST_PROMPTS:
        return None
    sign = 1 if scorer.higher_is_better else -1
    figures = compare_paired(
        sign * np.array([own for _, own, _ in scored]), sign * np.array([rival for _, _, rival in scored]), names
    )
    return comparison_of(
        figures, model=label, against=against, scorer=scorer.name, prompts=scope.prompts, category=scope.category
    )


# ---- warnings ----


def find_warnings(
    comparisons: Sequence[Comparison],
    scorers: Sequence[ScorerRow],
    images: Sequence[ImageRow],
    *,
    trained_on: Sequence[str],
) -> list[str]:
    """Return a line for each thing that a reader of the figures must know."""
    return [
        *_equal_models(comparisons, images),
        *_without_score(scorers, images),
        *_disagreements(comparisons),
        *_trained_on(scorers, trained_on),
    ]


def _equal_models(comparisons: Sequence[Comparison], images: Sequence[ImageRow]) -> Iterator[str]:
    digests: dict[str, dict[tuple[int, int], str]] = {}
    for image in images:
        digests.setdefault(image.model, {})[image.prompt, image.seed] = image.sha256
    for model, against in dict.fromkeys((each.model, each.against) for each in comparisons):
        if digests[model] == digests[against]:
            yield f"{model} draws exactly the same images as {against}: check that both are what they should be"


def _without_score(scorers: Sequence[ScorerRow], images: Sequence[ImageRow]) -> Iterator[str]:
    for scorer in scorers:
        without = [image.path for image in images if image.scores[scorer.name] is None]
        if without:
            yield (
                f"{scorer.name} gave no number for {len(without)} of {len(images)} images, which its comparisons leave "
                f"out; the first: {without[0]}"
            )


def _disagreements(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield where one scorer's interval says that a model is better, and another's that it is worse."""
    scopes = dict.fromkeys((each.model, each.against, each.prompts, each.category) for each in comparisons)
    for model, against, prompts, category in scopes:
        same = [
            each
            for each in comparisons
            if (each.model, each.against, each.prompts, each.category) == (model, against, prompts, category)
        ]
        better = [each.scorer for each in same if each.mean_low > 0]
        worse = [each.scorer for each in same if each.mean_high < 0]
        if better and worse:
            where = prompts if category is None else f"{prompts}, {category}"
            yield (
                f"scorers disagree on {model} against {against} ({where}): better by {', '.join(better)}, worse by "
                f"{', '.join(worse)}; look at the images"
            )


def _trained_on(scorers: Sequence[ScorerRow], trained_on: Sequence[str]) -> Iterator[str]:
    for name in trained_on:
        if any(scorer.name == name for scorer in scorers):
            yield (
                f"{name} was trained on, and judges here: a model can learn to please it alone; trust a scorer that "
                "training did not use"
            )
