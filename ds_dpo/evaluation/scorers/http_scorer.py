"""A server as a scorer: an OpenAI-style model that sees images, or one that answers plain JSON; answers are kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ds_dpo.errors import ConfigError, ScorerError, cut, shown
from ds_dpo.evaluation.scorers.answer_cache import AnswerCache
from ds_dpo.evaluation.scorers.asking import AskingJudge, AskingScorer, AskingSettings, Question, asking, number_of
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.http_client import Client, RefusedError, Retries
from ds_dpo.evaluation.scorers.http_forms import FORMS, RATING, VERDICT, check_pattern, read_number
from ds_dpo.evaluation.scorers.settings import settings_of
from ds_dpo.evaluation.scorers.weights import record_of
from ds_dpo.outside import parse_json

SECRET_WORDS = ("key", "token", "secret", "password", "auth", "sig")


class HttpSettings(AskingSettings):
    """How a server is asked.

    form: openai (chat completions with images as data URLs) or json. model, prompt_template, parameters: of the
    request; {prompt} in the template is the prompt. answer_pattern: finds the number in the model's text, by its
    first group. answers: numbers of words that are no numbers. api_key_variable: name of the environment variable
    that holds the key. cache: folder of answers; the user's cache folder if unset, none: off.
    """

    free: ClassVar[tuple[str, ...]] = (
        *AskingSettings.free,
        "requests_at_once",
        "retries",
        "backoff_seconds",
        "api_key_variable",
        "cache",
    )

    form: Literal["openai", "json"] = "openai"
    model: str | None = None
    prompt_template: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0, "max_tokens": 64})
    answer_pattern: str | None = None
    answers: dict[str, float] = Field(default_factory=dict)
    requests_at_once: int = Field(default=8, ge=1, le=256)
    retries: int = Field(default=4, ge=0, le=20)
    backoff_seconds: float = Field(default=1.0, ge=0, le=60, allow_inf_nan=False)
    api_key_variable: str | None = None
    cache: str | None = None

    @model_validator(mode="after")
    def _check(self) -> HttpSettings:
        if self.form == "openai" and not self.model:
            raise ValueError("model must be given for form openai: the name by which the server knows its model")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template must contain {prompt}, which the prompt takes the place of")
        if self.answer_pattern is not None:
            check_pattern(self.answer_pattern)
        return self


def open_http(choice: ScorerChoice, device: str) -> AskingScorer | AskingJudge:
    """Return a scorer that asks a server. Raises ScorerError for settings of no use; nothing is sent yet."""
    assert choice.source is not None  # the table demands one
    settings = settings_of(choice, HttpSettings)
    _check_url(choice.name, choice.source)
    record = record_of(choice, weights=(), packages=("requests", "pillow"), settings=settings.identity())
    client = Client(
        url=choice.source,
        scorer=choice.name,
        key=_key(choice.name, settings.api_key_variable),
        retries=Retries(settings.retries, settings.backoff_seconds, settings.timeout_seconds),
    )
    try:
        cache = AnswerCache.of(settings.cache)
    except ConfigError as error:
        raise ScorerError(f"scorer {choice.name}: {error}") from error
    server = _Server(choice.name, settings, client, cache, record)
    return asking(name=choice.name, settings=settings, record=record, ask=server.ask)


class _Server:
    """Asks questions at the same time, and keeps each answer under the hash of all that it depends on."""

    def __init__(
        self, name: str, settings: HttpSettings, client: Client, cache: AnswerCache, record: Mapping[str, object]
    ) -> None:
        self._name = name
        self._settings = settings
        self._client = client
        self._cache = cache
        # a new version of a library asks the same question
        self._identity = {name: value for name, value in record.items() if name != "versions"}
        self._form = FORMS[settings.form]
        self._template = settings.prompt_template or (VERDICT if settings.pairwise else RATING)
        self._has_answered = False

    def ask(self, questions: Sequence[Question]) -> NDArray[np.float64]:
        with ThreadPoolExecutor(self._settings.requests_at_once) as threads:
            waiting = [threads.submit(self._ask_one, question) for question in questions]
            try:
                return np.array([each.result() for each in waiting], dtype=np.float64)
            except BaseException:
                self._client.give_up()
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _ask_one(self, question: Question) -> float:
        key = self._cache.key(self._identity, question)
        kept = self._cache.get(key)
        if kept is not None:
            with contextlib.suppress(ScorerError):  # a disk may have torn it
                number = self._number(kept)
                self._has_answered = True
                return number
        text = self._template.replace("{prompt}", question.prompt)
        try:
            answer = self._client.post(self._form.body(self._settings, text, question))
        except RefusedError as error:
            if self._has_answered:  # it refuses this image or prompt, such as by a filter of contents
                return float("nan")
            raise ScorerError(str(error)) from None
        number = self._number(answer)  # before it is kept, since it may be no answer at all
        self._has_answered = True
        self._cache.put(key, answer)
        return number

    def _number(self, answer: str) -> float:
        place = f"scorer {self._name}: {self._client.place} answered"
        try:
            content = parse_json(answer)
        except ValueError:
            raise ScorerError(f"{place} {shown(answer)}, which is no JSON; check its URL") from None
        if self._settings.form == "json":
            return number_of(content, key="preference" if self._settings.pairwise else "score", place=place)
        text = self._form.text(content)
        if text is None:
            raise ScorerError(f"{place} {shown(content)}, which is no chat completion; check its URL and `form`")
        return read_number(text, self._settings)


def _check_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ScorerError(f"scorer {name}: the URL cannot be read ({cut(str(error))})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ScorerError(f"scorer {name}: {cut(url)} is no URL; give http://HOST:PORT/PATH or https://HOST/PATH")
    secret = next(
        (word for word, _ in parse_qsl(parts.query) if any(part in word.lower() for part in SECRET_WORDS)), None
    )
    if parts.username or parts.password or secret:
        where = f"in its parameter {cut(secret)}" if secret else "before its @"
        raise ScorerError(
            f"scorer {name}: the URL has a secret {where}, which would be written into results; put it into an "
            "environment variable, and its name into api_key_variable of a settings file"
        )


def _key(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ScorerError(
            f"scorer {name}: the environment variable {cut(variable)} is not set; put the API key into it"
        )
    return key
