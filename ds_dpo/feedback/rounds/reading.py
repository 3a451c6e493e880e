"""Read the configuration file of scripts/rounds.py strictly, and check what it names. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from ds_dpo.config.asset_paths import PACKAGE, resolve_asset
from ds_dpo.config.base import Section
from ds_dpo.config.documents import read_yaml
from ds_dpo.config.fields import did_you_mean
from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.evaluation.scorers.choice import ScorerChoice, read_choices
from ds_dpo.feedback.rounds.config import RoundsConfig
from ds_dpo.feedback.rounds.run_options import run_config

FOLDER = PACKAGE / "assets" / "rounds"
EXAMPLES = ("miniature",)


def find_config(name: str) -> Path:
    """Return the file of an example that comes with the package, else the path that is named."""
    return FOLDER / f"{name}.yaml" if name in EXAMPLES else Path(name).expanduser()


def read_rounds(path: Path, *, output_dir: Path | None = None) -> RoundsConfig:
    """Read a configuration file, and check its scorers and its run. Raises ConfigError, naming the field.

    output_dir: takes the place of the file's.
    """
    document = read_yaml(path, dict)
    if output_dir is not None:
        document = {**document, "output_dir": str(output_dir)}
    config = parse_rounds(document, source=str(path))
    check_scorers(config)
    run_config(config, number=1, pairs=Path("pairs.parquet"))
    return config


def parse_rounds(document: dict[Any, Any], *, source: str) -> RoundsConfig:
    """Return what a document holds. Raises ConfigError, naming each field that is wrong."""
    try:
        return RoundsConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(map(_problem, error.errors(include_url=False)))) from None


def _problem(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        near = did_you_mean(str(error["loc"][-1]), _names(error["loc"][:-1]))
        return f"there is no field {cut(place)}{near}"
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "value_error":
        return cut(str(error["ctx"]["error"]))
    return f"{cut(place)} = {shown(error['input'])}: {cut(error['msg'])}"


def _names(place: tuple[Any, ...]) -> list[str]:
    section: Any = RoundsConfig
    for name in place:
        section = section.model_fields[name].annotation
    return list(section.model_fields)


def check_scorers(config: RoundsConfig) -> None:
    """Raise ConfigError for a scorer that there is not, and a held-out scorer that labels pairs as well."""
    training = read_choices(config.training_scorers)
    read_choices(config.judging_scorers)
    if config.evaluation.held_out is None:
        return
    (held_out,) = read_choices([resolve_asset(config.evaluation.held_out)])
    for choice in training:
        if choice.name == held_out.name or _content(choice) == _content(held_out):
            raise ConfigError(
                f"evaluation.held_out {config.evaluation.held_out}: {choice.name} labels the pairs (scorers), so it is "
                "trained on and shows no harm that training does; give another scorer"
            )


def _content(choice: ScorerChoice) -> tuple[object, ...]:
    return choice.kind, choice.source, tuple(sorted(map(str, choice.settings.items())))


def held_out_name(config: RoundsConfig) -> str | None:
    """Return the column of the held-out scorer's scores; None without one."""
    held_out = config.evaluation.held_out
    return None if held_out is None else read_choices([resolve_asset(held_out)])[0].name


def field_lines() -> Iterator[str]:
    """Yield a line for each field of the file, with its default and its help."""
    yield from _lines_of(RoundsConfig, "")


def _lines_of(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield f"{prefix}{name}: {field.description}"
            yield from _lines_of(field.annotation, f"{prefix}  ")
            continue
        default = "required" if field.default is PydanticUndefined else f"default {shown(field.default)}"
        yield f"{prefix}{name} ({default}): {field.description}"
