"""Read YAML and JSON documents: whatever a file holds, it is read whole or refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ds_dpo.config.bounded_yaml import BoundedLoader
from ds_dpo.config.plain_scalar import BOOL, FLOAT, INT, NULL, Plain, plain
from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.outside import parse_json, read_regular

Document = TypeVar("Document", dict[Any, Any], list[Any])
# each is read within 10 s and 1 GB, whatever it holds
MAX_BYTES = {"JSON": 4 * 2**20, "YAML": 2**19}
TOO_DEEP = "nested too deeply"
KINDS: dict[type, str] = {dict: "names and values", list: "a list"}


def read_yaml(path: Path, kind: type[Document], *, advice: str | None = None) -> Document:
    """Return what a YAML file holds, a dict or a list as asked. Raises ConfigError as `read_document` does."""
    return read_document(path, kind, parse_yaml, language="YAML", advice=advice)


def read_yaml_as_written(path: Path) -> dict[Any, Any]:
    """Return the names and values of a YAML file, with a `Plain` for each word that is neither quoted nor text.

    Raises ConfigError as `read_document` does.
    """
    return read_document(path, dict, lambda text: _loaded(text, _LoaderAsWritten), language="YAML")


def read_json(path: Path, kind: type[Document], *, advice: str | None = None) -> Document:
    """Return what a JSON file holds, a dict or a list as asked. Raises ConfigError as `read_document` does."""
    return read_document(path, kind, parse_json, language="JSON", advice=advice)


def read_document(
    path: Path,
    kind: type[Document],
    parse: Callable[[str], Any],
    *,
    language: str,
    max_bytes: int | None = None,
    advice: str | None = None,
) -> Document:
    """Return what parse makes of a file's text, which must be of a kind.

    max_bytes: the most that are read, by default those of its language. advice: what to do about a file that cannot be
    used. Raises ConfigError, in one line, naming the file, what is wrong with it and the advice.
    """
    try:
        return _parsed(path, kind, parse, language, max_bytes or MAX_BYTES[language])
    except _UnusableError as error:
        raise ConfigError(f"{path} {error}" + (f"; {advice}" if advice else "")) from error


def parse_yaml(text: str) -> Any:
    """Parse YAML by the core schema of version 1.2, and refuse a key given twice. Raises ValueError.

    `1e-8` is a number, 010 is ten, and yes, off, 1:30 and 2024-01-01 are text.
    """
    return _loaded(text, _Loader)


def _loaded(text: str, loader: type[yaml.SafeLoader]) -> Any:
    if len(text) > MAX_BYTES["YAML"]:  # in a file of another kind, such as a dataset's README.md
        raise ValueError(f"longer than {MAX_BYTES['YAML']} characters")
    try:
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ValueError(f"{cut(error.problem or error.context or 'malformed')}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # a tag on text of another form
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from error


class _UnusableError(Exception):
    """What is wrong with a document, as the end of a sentence that begins with its path."""


def _parsed(path: Path, kind: type[Document], parse: Callable[[str], Any], language: str, max_bytes: int) -> Document:
    try:
        text = read_regular(path, max_bytes=max_bytes).decode("utf-8")
    except OSError as error:
        raise _UnusableError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _UnusableError(f"is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    if not text.strip():
        raise _UnusableError("is empty")
    try:
        content = parse(text)
    except RecursionError as error:
        raise _UnusableError(f"is {TOO_DEEP}") from error
    except ValueError as error:
        if str(error) == TOO_DEEP:
            raise _UnusableError(f"is {TOO_DEEP}") from error
        raise _UnusableError(f"is not valid {language}: {cut(str(error), characters=400)}") from error
    may_hold_nul = "\0" in text or "\\" in text  # only an escape or the character itself becomes one
    if may_hold_nul and _holds_nul(content):
        raise _UnusableError("holds a text with the character NUL, which no name, path or prompt may have")
    if not isinstance(content, kind):
        raise _UnusableError(f"must contain {KINDS[kind]}, not {_described(content)}")
    return content


def _described(content: Any) -> str:
    content = content.value if isinstance(content, Plain) else content
    return KINDS.get(type(content)) or shown(content)


def _holds_nul(content: Any) -> bool:
    """Return whether a text anywhere in a document has the character NUL, looking once at each of its parts."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if "\0" in value:
                return True
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend([*value.keys(), *value.values()] if isinstance(value, dict) else value)
    return False


def _first_repeated(keys: list[Any]) -> Any:
    known = set()
    for key in keys:
        if not isinstance(key, Hashable):  # which the loader refuses by itself
            continue
        if key in known:
            return key
        known.add(key)
    return None


class _Loader(BoundedLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = _first_repeated(keys)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{cut(str(repeated))} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _LoaderAsWritten(_Loader):
    """Keeps the text of each plain word beside its meaning."""


_TAG = "tag:yaml.org,2002:"
_TYPES: dict[str, Any] = {"null": type(None), "bool": bool, "int": int, "float": int | float}


def _as_written(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Plain:
    written = plain(str(loader.construct_scalar(node)))
    if not isinstance(written.value, _TYPES[node.tag.removeprefix(_TAG)]):
        problem = f"{cut(written.text)} does not fit its tag, {node.tag.removeprefix(_TAG)}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return written


def _meaning(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return _as_written(loader, node).value


_Loader.yaml_implicit_resolvers = {"<": [(f"{_TAG}merge", re.compile(r"^<<$"))]}
for _kind, _pattern, _first in (
    ("null", NULL, ["~", "n", "N", ""]),
    ("bool", BOOL, list("tTfF")),
    ("int", INT, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
    _Loader.add_constructor(_TAG + _kind, _meaning)
    _LoaderAsWritten.add_constructor(_TAG + _kind, _as_written)
