"""Which scorers a user asks for: the words after --scorer, read and checked without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_dpo.config.base import in_home
from ds_dpo.config.documents import read_yaml
from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.evaluation.scorers.table import SCORERS, known_kinds, require_known

FORMS = "give NAME, NAME=SOURCE, or a .yaml file with `scorer: NAME`"
SUFFIXES = (".yaml", ".yml")
COLUMN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # part of file names and of TensorBoard's tags


@dataclass(frozen=True, kw_only=True)
class ScorerChoice:
    """A scorer that a user asks for.

    name: column of its scores. kind: row of the table, or name of a plugin. source: as given, or the row's default.
    settings: further options of the kind, as a settings file states them.
    """

    name: str
    kind: str
    source: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_choices(words: Sequence[str]) -> tuple[ScorerChoice, ...]:
    """Read the words after --scorer: NAME, NAME=SOURCE, or the path of a settings file.

    Raises ConfigError for an unknown name, a source that is missing or of no use, and two scorers of one name.
    """
    choices = tuple(_read_file(word) if _is_file(word) else _read_word(word) for word in words)
    names = [choice.name for choice in choices]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ConfigError(
            f"--scorer: two scorers have the name {twice}, which is a column of the results; leave one out, or give "
            "one of them a `name` of its own in a settings file"
        )
    return choices


def _is_file(word: str) -> bool:
    # the command of a program may end in the name of a YAML file
    return word.endswith(SUFFIXES) and word.partition("=")[0] not in known_kinds()


def _read_word(word: str) -> ScorerChoice:
    kind, equals, source = word.partition("=")
    if not kind.strip() or (equals and not source.strip()):
        raise ConfigError(f"--scorer {shown(word)} is incomplete; {FORMS}")
    return _choice(f"--scorer {cut(word)}", name=kind, kind=kind, source=source or None, settings={})


def _read_file(word: str) -> ScorerChoice:
    path = Path(_in_home(word, "--scorer"))
    settings = dict(read_yaml(path, dict))
    kind = settings.pop("scorer", None)
    name, source = settings.pop("name", kind), settings.pop("source", None)
    for key, value in (("scorer", kind), ("name", name), ("source", source or "")):
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {key} = {shown(value)}; it must be text, such as `{key}: http`")
    odd = next((key for key in settings if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"{path}: the name {shown(odd)} is not text")
    return _choice(str(path), name=name, kind=kind, source=source or None, settings=settings)


def _choice(place: str, *, name: str, kind: str, source: str | None, settings: Mapping[str, Any]) -> ScorerChoice:
    require_known(kind)
    if not COLUMN.fullmatch(name):
        raise ConfigError(
            f"{place}: name = {shown(name)}; it must have 1 to 64 letters, digits, dots, hyphens or underscores, the "
            "first of them a letter or digit"
        )
    if source is not None:
        source = _in_home(source, place)
    if (row := SCORERS.get(kind)) is not None:
        if source is None and row.needs_source:
            raise ConfigError(
                f"{place}: the scorer {kind} needs a source, which is {row.takes}; give {kind}=SOURCE, or a settings "
                "file with `source` (docs/scorers.md)"
            )
        if source is not None and row.takes is None:
            raise ConfigError(f"{place}: the scorer {kind} takes no source; give {kind}")
        source = source or row.source
    return ScorerChoice(name=name, kind=kind, source=source, settings=settings)


def _in_home(path: str, place: str) -> str:
    try:
        return in_home(path)
    except ValueError as error:
        raise ConfigError(f"{place} {cut(path)}: {error}") from error
