"""The results of an evaluation: what was drawn, how it was scored, and how the models compare. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model. label: its name in all tables. source: what it was read from. step: of a run, or None."""

    label: str
    source: str
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScorerRow:
    """A scorer or a judge of pairs. record: versions, hashes of weights and the like, as in Scorer."""

    name: str
    higher_is_better: bool
    record: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt of a set. prompt_set: name of the set. category: None if the set has no categories."""

    prompt: str
    prompt_set: str
    category: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """An image. model: label. prompt: place in Results.prompts. path: below the evaluation's folder, with slashes.

    scores: by name of scorer; None if the scorer gave no number.
    """

    model: str
    prompt: int
    seed: int
    path: str
    sha256: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against another one by one scorer, on a prompt set or one of its categories.

    prompts: name of the set, or "all". category: None is all of the set. n: pairs of images of the same prompt and
    seed. num_prompts: different prompts among them. win_rate: share of n that the model wins, a tie counts half.
    mean_difference, median_difference: of the score, positive if the model is better. low, high, mean_low, mean_high:
    95 % intervals. p_value: of the sign test over prompts. adjusted_p_value: corrected for the number of scorers.
    prompts_needed: number of prompts that a test at 5 % needs to see this difference with 80 % probability; None if
    there is no difference to see.
    """

    model: str
    against: str
    scorer: str
    prompts: str
    category: str | None
    n: int
    num_prompts: int
    win_rate: float
    low: float
    high: float
    mean_difference: float
    mean_low: float
    mean_high: float
    median_difference: float
    p_value: float
    adjusted_p_value: float
    prompts_needed: int | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole evaluation. evaluation: its id, which votes name. settings: how the images were drawn, as JSON values."""

    evaluation: str
    models: Sequence[ModelRow]
    scorers: Sequence[ScorerRow]
    prompts: Sequence[PromptRow]
    images: Sequence[ImageRow]
    comparisons: Sequence[Comparison]
    settings: Mapping[str, object]
    warnings: Sequence[str] = ()
