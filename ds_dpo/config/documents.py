"""Read YAML and JSON documents: whatever a file holds, it is read whole or refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ds_dpo.errors import ConfigError

Document = TypeVar("Document", dict[Any, Any], list[Any])
KINDS: dict[type, str] = {dict: "names and values", list: "a list"}


def read_yaml(path: Path, kind: type[Document], *, advice: str | None = None) -> Document:
    """Return what a YAML file holds, a dict or a list as asked. Raises ConfigError as `read_document` does."""
    return read_document(path, kind, parse_yaml, language="YAML", advice=advice)


def read_json(path: Path, kind: type[Document], *, advice: str | None = None) -> Document:
    """Return what a JSON file holds, a dict or a list as asked. Raises ConfigError as `read_document` does."""
    return read_document(path, kind, json.loads, language="JSON", advice=advice)


def read_document(
    path: Path, kind: type[Document], parse: Callable[[str], Any], *, language: str, advice: str | None = None
) -> Document:
    """Return what parse makes of a file's text, which must be of a kind.

    advice: what to do about a file that cannot be used. Raises ConfigError, in one line, naming the file, what is wrong
    with it and the advice.
    """
    try:
        return _parsed(path, kind, parse, language)
    except _UnusableError as error:
        raise ConfigError(f"{path} {error}" + (f"; {advice}" if advice else "")) from error


def parse_yaml(text: str) -> Any:
    """Parse YAML that reads `1e-8` as a number, `off` as text, and refuses a key given twice. Raises ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _UnusableError(Exception):
    """What is wrong with a document, as the end of a sentence that begins with its path."""


def _parsed(path: Path, kind: type[Document], parse: Callable[[str], Any], language: str) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _UnusableError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _UnusableError(f"is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    if not text.strip():
        raise _UnusableError("is empty")
    try:
        content = parse(text)
    except ValueError as error:
        raise _UnusableError(f"is not valid {language}: {error}") from error
    except RecursionError as error:
        raise _UnusableError("is nested too deeply") from error
    if not isinstance(content, kind):
        raise _UnusableError(f"must contain {KINDS[kind]}, not {_described(content)}")
    return content


def _described(content: Any) -> str:
    return KINDS.get(type(content)) or repr(content)[:40]


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+0123456789."),
)
