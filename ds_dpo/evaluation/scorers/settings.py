"""What a settings file may state for each kind of scorer, checked without torch."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_dpo.config.fields import did_you_mean
from ds_dpo.errors import ScorerError, shown
from ds_dpo.evaluation.scorers.choice import ScorerChoice


class Settings(BaseModel):
    """Options that each kind of scorer has. images_at_once: of one call of `score`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    images_at_once: int = Field(default=32, ge=1, le=4096)


S = TypeVar("S", bound=Settings)


def settings_of(choice: ScorerChoice, model: type[S]) -> S:
    """Return the settings of a choice. Raises ScorerError, in one line, for an unknown name or a value of no use."""
    try:
        return model.model_validate(dict(choice.settings))
    except ValidationError as error:
        raise ScorerError(
            f"scorer {choice.name}: {'; '.join(_problem(one, model) for one in error.errors())}"
        ) from None


def _problem(error: object, model: type[Settings]) -> str:
    details: dict = error  # type: ignore[assignment]
    key = ".".join(map(str, details["loc"]))
    if details["type"] == "missing":
        return f"{key} must be given"
    if details["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return f"there is no setting {shown(key)}; {', '.join(known)} would fit{did_you_mean(key, known)}"
    message = str(details["msg"]).removeprefix("Value error, ")
    if not key:  # of a rule between settings, which names them
        return message
    return f"{key} = {shown(details['input'])}: {message}"
