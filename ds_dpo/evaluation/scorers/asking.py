"""Scorers and judges that ask something outside this process: a program, or a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from ds_dpo.errors import ScorerError, shown
from ds_dpo.evaluation.scorers.batches import as_rgb, score_in_batches
from ds_dpo.evaluation.scorers.settings import Settings


class AskingSettings(Settings):
    """What programs and servers have in common.

    pairwise: it compares two images instead of giving one a number. both_orders: ask twice, with the images swapped,
    and take the mean, since many judges prefer a place. timeout_seconds: the longest wait for one answer. version:
    whatever identifies what answers, for the record.
    """

    higher_is_better: bool = True
    pairwise: bool = False
    both_orders: bool = True
    timeout_seconds: float = Field(default=120.0, gt=0, le=86_400, allow_inf_nan=False)
    version: str | None = None

    def identity(self) -> dict[str, object]:
        """Return what the scores depend on, as JSON values."""
        return self.model_dump(mode="json", exclude=set(self.free))

    # settings that change no score
    free: ClassVar[tuple[str, ...]] = ("images_at_once", "timeout_seconds")


@dataclass(frozen=True)
class Question:
    """One RGB image and its prompt, or two images of one prompt, the one that is judged first."""

    images: tuple[Image.Image, ...]
    prompt: str


# Gives one number for each question: a score, or the probability that the first image is better; NaN without an answer.
Ask = Callable[[Sequence[Question]], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class AskingScorer:
    """A `Scorer` that asks for one number an image."""

    name: str
    settings: AskingSettings
    record: Mapping[str, object]
    ask: Ask

    @property
    def higher_is_better(self) -> bool:
        return self.settings.higher_is_better

    @property
    def images_at_once(self) -> int:
        return self.settings.images_at_once

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        return score_in_batches(images, prompts, self._ask_all, at_once=self.images_at_once)

    def _ask_all(self, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
        return self.ask([Question((image,), prompt) for image, prompt in zip(images, prompts, strict=True)])


@dataclass(frozen=True, kw_only=True)
class AskingJudge:
    """A `PairJudge` that asks which of two images is better."""

    name: str
    settings: AskingSettings
    record: Mapping[str, object]
    ask: Ask

    @property
    def images_at_once(self) -> int:
        return self.settings.images_at_once

    def prefer(
        self, images: Sequence[Image.Image], rivals: Sequence[Image.Image], prompts: Sequence[str]
    ) -> NDArray[np.float64]:
        preferences = np.full(len(images), np.nan)
        sides = zip(images, rivals, prompts, strict=True)
        pairs = [(as_rgb(one), as_rgb(other), prompt) for one, other, prompt in sides]
        whole = [(place, (a, b, prompt)) for place, (a, b, prompt) in enumerate(pairs) if a and b]
        for start in range(0, len(whole), self.images_at_once):
            places, batch = zip(*whole[start : start + self.images_at_once], strict=True)
            preferences[list(places)] = self._ask_all(batch)
        return preferences

    def _ask_all(self, pairs: Sequence[tuple[Image.Image, Image.Image, str]]) -> NDArray[np.float64]:
        forward = self._checked(self.ask([Question((one, other), prompt) for one, other, prompt in pairs]))
        if not self.settings.both_orders:
            return forward
        swapped = self._checked(self.ask([Question((other, one), prompt) for one, other, prompt in pairs]))
        return (forward + (1 - swapped)) / 2

    def _checked(self, answers: NDArray[np.float64]) -> NDArray[np.float64]:
        outside = answers[(answers < 0) | (answers > 1)]
        if len(outside):
            raise ScorerError(
                f"scorer {self.name}: a preference is {outside[0]:g}; it must be between 0 (the rival is better) and 1"
            )
        return answers


def asking(
    *, name: str, settings: AskingSettings, record: Mapping[str, object], ask: Ask
) -> AskingScorer | AskingJudge:
    """Return a scorer, or a judge of pairs if the settings say so."""
    maker = AskingJudge if settings.pairwise else AskingScorer
    return maker(name=name, settings=settings, record=record, ask=ask)


def number_of(answer: object, *, key: str, place: str) -> float:
    """Return the number of an answer, `{key: number}` or a number alone; NaN for null and for one that is not finite.

    Raises ScorerError for anything else. place: the beginning of its message.
    """
    if isinstance(answer, Mapping):
        if key not in answer:
            raise ScorerError(f"{place} {shown(answer)}, which has no {key!r}; a JSON object with {key!r} would fit")
        answer = answer[key]
    if answer is None:
        return float("nan")
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise ScorerError(f"{place} {shown(answer)}; it must be a number, or null if there is none")
    try:
        value = float(answer)
    except OverflowError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")
