"""The table of all fields by dotted name, and the lookup of a field by any of its names."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_dpo.config.names import ALIASES, EXPLAINED, FLAT_NAMES
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One field: its dotted name, its values and its meaning.

    kind: the type of a value, or of a list's elements. choices: words that it takes. has_number, is_switch: whether it
    takes numbers beside the words, and whether its name alone, without a value, means true.
    """

    path: str
    description: str
    is_identity: bool
    kind: type
    choices: tuple[str, ...]
    has_number: bool
    is_switch: bool
    is_optional: bool
    is_list: bool
    default: Any

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield dotted names and pydantic fields; the classes of a union one after another."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        sections = [part for part in (annotation, *get_args(annotation)) if _is_section(part)]
        if not sections:
            yield prefix + name, info
        for section in sections:
            yield from _walk(section, f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _spec(path: str, info: FieldInfo) -> FieldSpec:
    annotation = info.annotation
    is_optional = get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
    if is_optional:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    is_list = get_origin(annotation) is list
    if is_list:
        annotation = get_args(annotation)[0]
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    choices = next((get_args(each) for each in alternatives if get_origin(each) is Literal), ())
    extra = info.json_schema_extra
    assert isinstance(extra, dict), f"{path} is made with identity_field or free_field"
    return FieldSpec(
        path=path,
        description=info.description or "",
        is_identity=bool(extra["identity"]),
        kind=str if choices else annotation if isinstance(annotation, type) else str,
        choices=choices,
        has_number=bool(choices) and int in alternatives,
        is_switch=bool in alternatives,
        is_optional=is_optional,
        is_list=is_list,
        default=None if info.is_required() else info.default,
    )


def _joined(first: FieldSpec, second: FieldSpec) -> FieldSpec:
    """Return the field of two classes of a union; it means the same in both, and `type` has the choices of both."""
    if first.path.endswith(".type"):
        return replace(first, choices=first.choices + second.choices)
    assert first == second, f"{first.path} means two things"
    return first


def _all_fields() -> dict[str, FieldSpec]:
    fields: dict[str, FieldSpec] = {}
    for path, info in _walk(RunConfig):
        spec = _spec(path, info)
        if path in fields:  # of a union's next class
            spec = _joined(fields[path], spec)
        fields[path] = spec
    return fields


FIELDS = _all_fields()
SECTIONS = tuple(dict.fromkeys(spec.section for spec in FIELDS.values() if spec.section))


def field_path(name: str, *, other_names: Iterable[str] = ()) -> str:
    """Return the dotted name of a field given by any of its names, with - or _.

    other_names: what else may be suggested. Raises ConfigError saying what was likely meant.
    """
    plain = name.replace("-", "_")
    path = FLAT_NAMES.get(plain) or ALIASES.get(plain) or plain
    if path in FIELDS:
        return path
    reason = EXPLAINED.get(plain.rpartition(".")[2])
    if reason is not None:
        raise ConfigError(f"{name} is not accepted: {reason}{_fields_named(plain)}")
    if plain in SECTIONS:
        inside = ", ".join(spec.path for spec in FIELDS.values() if spec.section == plain)
        raise ConfigError(f"{name} is a section; its fields are {inside}")
    near = _near_field(plain, other_names)
    raise ConfigError(f"{name} is not known{near or '; --help lists all'}")


def _fields_named(name: str) -> str:
    """Return '; fields of this name are ...', or '' if no section has a field of this name."""
    same = [path for path in FIELDS if path.endswith(f".{name}")]
    return f"; fields of this name are {', '.join(same)}" if same else ""


def _near_field(name: str, other_names: Iterable[str]) -> str:
    """Return '; did you mean A or B?', comparing within the section that a dotted name has or nearly has."""
    section, _, last = name.rpartition(".")
    if not section:
        without_section = [path for path in FIELDS if "." not in path]
        known = [*without_section, *FLAT_NAMES, *ALIASES, *SECTIONS, *other_names]
        return did_you_mean(name, known) or did_you_mean(name, FIELDS)
    near_sections = get_close_matches(section, SECTIONS, n=1, cutoff=0.7)
    here = _names_in(near_sections[0]) if near_sections else {}
    anywhere = {other: path for part in SECTIONS for other, path in _names_in(part).items()}
    for names in (here, anywhere):
        if last in names:
            return _question([names[last]])
    near = get_close_matches(last, here, n=2, cutoff=0.6)
    return _question([here[other] for other in near]) if near else did_you_mean(name, FIELDS)


def _names_in(section: str) -> dict[str, str]:
    """Return the dotted name of each field of a section by its names without the section, other trainers' included."""
    others = {other: path for other, path in {**FLAT_NAMES, **ALIASES}.items() if FIELDS[path].section == section}
    own = {path.rpartition(".")[2]: path for path, spec in FIELDS.items() if spec.section == section}
    return {**{other.rpartition(".")[2]: path for other, path in others.items()}, **own}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean A or B?', or '' where nothing is near; a name without its section is compared too."""
    known = list(known)
    by_last_part = {option.rpartition(".")[2]: option for option in reversed(known)}
    near = get_close_matches(name, known, n=2, cutoff=0.7) or [
        by_last_part[part] for part in get_close_matches(name.rpartition(".")[2], by_last_part, n=2, cutoff=0.6)
    ]
    return _question(near)


def _question(near: Iterable[str]) -> str:
    near = list(dict.fromkeys(near))
    return f"; did you mean {' or '.join(near)}?" if near else ""
