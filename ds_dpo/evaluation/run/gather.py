"""From drawn and scored images to the results of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_dpo.evaluation.results import ImageRow, ModelRow, PromptRow, Results, ScorerRow
from ds_dpo.evaluation.run.compare import compare_models, find_warnings, list_scopes
from ds_dpo.evaluation.run.drawn_images import DrawnImage
from ds_dpo.evaluation.run.models import LabelledModel
from ds_dpo.evaluation.run.prompt_sets import PromptSet
from ds_dpo.evaluation.run.score import EVEN, Key, key_of
from ds_dpo.evaluation.run.settings import EvaluationRecord
from ds_dpo.evaluation.run.side_effects import SideEffects, diversity_of, side_effects
from ds_dpo.evaluation.run.work import Group
from ds_dpo.evaluation.scorers.opening import is_judge
from ds_dpo.evaluation.scorers.scorer import PairJudge, Scorer


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A scorer with all that it gave. row: as results show it."""

    row: ScorerRow
    compares_pairs: bool
    scores: Mapping[Key, float]

    @classmethod
    def of(cls, scorer: Scorer | PairJudge, scores: Mapping[Key, float]) -> Scored:
        higher = getattr(scorer, "higher_is_better", True)  # of a judge it is a probability
        row = ScorerRow(name=scorer.name, higher_is_better=higher, record=dict(scorer.record))
        return cls(row=row, compares_pairs=is_judge(scorer), scores=scores)


def gather_results(
    record: EvaluationRecord,
    models: Sequence[LabelledModel],
    sets: Sequence[PromptSet],
    groups: Mapping[str, Sequence[Group]],
    drawn: Mapping[str, DrawnImage],
    scored: Sequence[Scored],
    *,
    against: str,
    trained_on: Sequence[str],
) -> Results:
    """Return the results. groups: by label, one for each set."""
    prompts = [
        PromptRow(prompt=prompt.text, prompt_set=each.name, category=prompt.category)
        for each in sets
        for prompt in each.prompts
    ]
    images = [
        image
        for model in models
        for image in _image_rows(groups[model.label], groups[against], drawn, scored, seeds=record.settings.seeds)
    ]
    scorers = [each.row for each in scored]
    labels = [model.label for model in models]
    comparisons = compare_models(labels, against, scorers, list_scopes(sets, prompts), prompts, images)
    settings = {name: value for name, value in asdict(record.settings).items() if value is not None}
    return Results(
        evaluation=record.id,
        models=[ModelRow(label=model.label, source=model.name, step=model.found.step) for model in models],
        scorers=scorers,
        prompts=prompts,
        images=images,
        comparisons=comparisons,
        settings={**settings, "versions": dict(record.versions)},
        warnings=find_warnings(comparisons, scorers, images, trained_on=trained_on),
    )


def _image_rows(
    groups: Sequence[Group],
    rivals: Sequence[Group],
    drawn: Mapping[str, DrawnImage],
    scored: Sequence[Scored],
    *,
    seeds: int,
) -> Iterator[ImageRow]:
    first = 0  # place of a set's first prompt among all prompts
    for group, against in zip(groups, rivals, strict=True):
        for number, (task, other) in enumerate(zip(group.tasks, against.tasks, strict=True)):
            image, rival = drawn[task.path], drawn[other.path]
            yield ImageRow(
                model=group.label,
                prompt=first + number // seeds,
                seed=task.seed,
                path=task.path,
                sha256=image.sha256,
                scores={each.row.name: _score(each, task.prompt.text, image, rival, group, against) for each in scored},
            )
        first += len(group.prompt_set.prompts)


def _score(
    scored: Scored, prompt: str, image: DrawnImage, rival: DrawnImage, group: Group, against: Group
) -> float | None:
    if scored.compares_pairs and group.label == against.label:
        return EVEN  # what the probability of the others is compared with
    score = scored.scores.get(key_of(prompt, image, rival if scored.compares_pairs else None), math.nan)
    return score if math.isfinite(score) else None


def gather_side_effects(
    groups: Mapping[str, Sequence[Group]], drawn: Mapping[str, DrawnImage], out: Path, *, seeds: int
) -> dict[str, SideEffects]:
    """Return how each model's images look, by label."""
    return {label: _side_effects(of_model, drawn, out, seeds=seeds) for label, of_model in groups.items()}


def _side_effects(groups: Sequence[Group], drawn: Mapping[str, DrawnImage], out: Path, *, seeds: int) -> SideEffects:
    looks = [drawn[task.path].look for group in groups for task in group.tasks]
    of_prompts = [
        [out / task.path for task in group.tasks[start : start + seeds]]
        for group in groups
        for start in range(0, len(group.tasks), seeds)
    ]
    return side_effects(looks, diversity_of(of_prompts))
