"""Read the run configuration: a preset or file, then the command line, into one validated RunConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ds_dpo.config.asset_paths import PACKAGE
from ds_dpo.config.command_line import config_name, parse_command_line, same_value
from ds_dpo.config.documents import read_yaml
from ds_dpo.config.fields import FIELDS, SECTIONS, did_you_mean, field_path
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError

PRESETS = PACKAGE / "presets"


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """What a command asks for. world_size: number of ranks for a dry run; None: the ranks that exist."""

    config: RunConfig
    dry_run: bool
    world_size: int | None


def load_config(argv: Sequence[str]) -> LoadedConfig:
    """Read a command's options on top of the preset or file that --config names.

    --help prints and raises SystemExit(0). Raises ConfigError for anything unknown, contradictory or out of bounds.
    """
    lower = read_layer(config_name(argv))
    command = parse_command_line(argv, shown=lower)
    if command.world_size is not None and command.world_size < 1:
        raise ConfigError(f"--world_size {command.world_size}: at least 1 rank is needed")
    config = build_config(overlay(lower, command.values))
    return LoadedConfig(config=config, dry_run=command.dry_run, world_size=command.world_size)


def preset_names() -> list[str]:
    """Return the names of presets, which --config accepts besides files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def config_to_yaml(config: RunConfig) -> str:
    """Return every field with its value, as config_from_yaml reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def config_from_yaml(path: Path | str) -> RunConfig:
    """Read a configuration file, such as a run folder's config.yaml. Raises ConfigError."""
    values = _read_file(Path(path), below=())
    try:
        return build_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ---- layers: flat dicts of dotted names ----


def read_layer(name: str) -> dict[str, Any]:
    """Return the values of a preset or YAML file by dotted name. Raises ConfigError."""
    if name in preset_names():
        return _read_file(PRESETS / f"{name}.yaml", below=())
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file():
        return _read_file(path, below=())
    presets = preset_names()
    raise ConfigError(
        f"--config {name} is neither a preset ({', '.join(presets)}) nor a file{did_you_mean(name, presets)}"
    )


def _read_file(path: Path, *, below: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file on top of the preset or file that its `base` names. below: the files that led here."""
    document = read_yaml(path, dict)
    base = document.pop("base", None)
    values = _flatten(document, source=path)
    if base is None:
        return values
    base_path = PRESETS / f"{base}.yaml" if base in preset_names() else path.parent / str(base)
    chain = (*below, path.resolve())
    if base_path.resolve() in chain:
        raise ConfigError(f"{path}: base {base} leads back to itself")
    return overlay(_read_file(base_path, below=chain), values)


def _flatten(document: Mapping[str, Any], *, source: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in _named_values(document, source=source):
        try:
            path = field_path(name)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        if path in values and not same_value(values[path], value):
            raise ConfigError(f"{source}: {path} is set twice with different values: {values[path]} and {value}")
        values[path] = value
    return values


def _named_values(document: Mapping[str, Any], *, source: Path) -> Iterable[tuple[str, Any]]:
    for key, value in document.items():
        if key not in SECTIONS:
            yield str(key), value
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif value is not None:
            raise ConfigError(f"{source}: {key} is a section and must contain names and values, not {value!r}")


def overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Return all values; upper wins. Another objective or adapter inherits none of the lower one's settings."""
    for section in ("objective", "adapter"):
        kind = upper.get(f"{section}.type")
        if kind is not None and kind != lower.get(f"{section}.type"):
            lower = {path: value for path, value in lower.items() if not path.startswith(f"{section}.")}
    return {**lower, **upper}


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Validate values by dotted name. Raises ConfigError with each wrong field, its value and what would fit."""
    nested: dict[str, Any] = {section: {} for section in SECTIONS}
    for path, value in values.items():
        if isinstance(value, bool) and FIELDS[path].kind is not bool:
            value = _word(path, value)
        section, _, name = path.rpartition(".")
        (nested[section] if section else nested)[name] = value
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        problems = [_problem(one, values) for one in error.errors()]
        raise ConfigError("\n  ".join(["the configuration is not valid:", *problems])) from None


def _word(path: str, switch: bool) -> str:
    """Return YAML's true as a word, for a field that has it as a choice; pydantic would read it as the number 1."""
    word = str(switch).lower()
    if word not in FIELDS[path].choices:
        raise ConfigError(f"{path} = {word}: the option is not a switch that can be true or false")
    return word


def _problem(error: Any, values: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    if location[:1] == ["objective"] and len(location) == 3:
        location = [location[0], location[2]]  # pydantic inserts the chosen class
    path = ".".join(location)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{path} must be given. {FIELDS[path].description}" if path in FIELDS else f"{path} must be given"
    if error["type"] == "extra_forbidden":
        return f"{path} = {error['input']}: objective.type {values.get('objective.type')} has no such field"
    if error["type"].startswith("union_tag"):
        choices = ", ".join(FIELDS["objective.type"].choices)
        return f"objective.type = {values.get('objective.type')}: one of {choices} would fit"
    if error["type"] == "value_error" and path not in FIELDS:
        return message  # the message of a rule between fields names them
    return f"{path} = {error['input']}: {message}"
