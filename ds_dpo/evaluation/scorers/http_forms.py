"""What servers are sent and what their answers mean: chat completions in OpenAI's form, or plain JSON."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from ds_dpo.evaluation.scorers.asking import Question

RATING = (
    "Rate this image, which a model drew for a prompt, from 0 to 10: how well it shows what the prompt asks for, and "
    "how good it looks. Answer with the number alone.\nPrompt: {prompt}"
)
VERDICT = (
    "Two models drew these two images for one prompt. Which image is better: does it show what the prompt asks for, "
    "and does it look good? Answer with 1 for the first image, 2 for the second, or 0 if they are equally good, and "
    "nothing else.\nPrompt: {prompt}"
)
NUMBER = r"(-?\d+(?:\.\d+)?)"
PLACES: Mapping[str, float] = {"1": 1.0, "2": 0.0, "0": 0.5}
MAX_ANSWER_CHARACTERS = 20_000


class Asked(Protocol):
    """The settings that requests and answers depend on."""

    @property
    def pairwise(self) -> bool: ...
    @property
    def model(self) -> str | None: ...
    @property
    def parameters(self) -> dict[str, Any]: ...
    @property
    def answer_pattern(self) -> str | None: ...
    @property
    def answers(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Form:
    """body: of a request. text: the model's words in a parsed answer, None if it has none."""

    body: Callable[[Asked, str, Question], dict[str, Any]]
    text: Callable[[Any], str | None]


def _chat_body(settings: Asked, text: str, question: Question) -> dict[str, Any]:
    images = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(image)}"}} for image in question.images
    ]
    content = [*images, {"type": "text", "text": text}]
    return {**settings.parameters, "model": settings.model, "messages": [{"role": "user", "content": content}]}


def _chat_text(answer: Any) -> str | None:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
    return "" if content is None else content if isinstance(content, str) else None


def _plain_body(settings: Asked, text: str, question: Question) -> dict[str, Any]:
    roles = dict(zip(("image", "rival"), map(_png, question.images), strict=False))
    model = {"model": settings.model} if settings.model else {}
    return {**model, **roles, "prompt": question.prompt}


FORMS: Mapping[str, Form] = {
    "openai": Form(body=_chat_body, text=_chat_text),
    "json": Form(body=_plain_body, text=lambda answer: None),
}


def check_pattern(pattern: str) -> None:
    """Raise ValueError for an answer_pattern that is no regular expression with a group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"answer_pattern is no regular expression: {error}") from error
    if groups < 1:
        raise ValueError("answer_pattern must have a group in parentheses around the answer")


def read_number(text: str, settings: Asked) -> float:
    """Return the number in a model's words, NaN if there is none; of a pair, the first image's probability."""
    pattern = settings.answer_pattern or (r"(?<![\d.])([012])(?![\d.]*\d)" if settings.pairwise else NUMBER)
    found = re.search(pattern, text[:MAX_ANSWER_CHARACTERS])
    word = (found[1] or "").strip() if found else ""
    meanings = {key.casefold(): value for key, value in settings.answers.items()}
    if not meanings and settings.pairwise and settings.answer_pattern is None:
        meanings = dict(PLACES)
    if word.casefold() in meanings:
        return meanings[word.casefold()]
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _png(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")
