"""Read the run configuration: a preset or file, then the command line, into one validated RunConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from ds_dpo.config.asset_paths import PACKAGE
from ds_dpo.config.base import in_home
from ds_dpo.config.command_line import config_name, parse_command_line, question, same_value
from ds_dpo.config.documents import read_yaml_as_written
from ds_dpo.config.fields import FIELDS, SECTIONS, did_you_mean, field_path
from ds_dpo.config.given import refuse_what_has_no_effect
from ds_dpo.config.layers import Layer, merge
from ds_dpo.config.run import RunConfig
from ds_dpo.config.schema import schema_text
from ds_dpo.config.values import meant, settled
from ds_dpo.config.version import version_text
from ds_dpo.errors import ConfigError, cut, shown

PRESETS = PACKAGE / "presets"


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """What a command asks for. world_size: number of ranks for a dry run; None: the ranks that exist.

    remarks: lines for the user on how its layers were joined. resume: step of the checkpoint to go on from, or never;
    None for the newest one.
    """

    config: RunConfig
    dry_run: bool
    world_size: int | None
    remarks: Sequence[str] = ()
    resume: int | Literal["never"] | None = None


def load_config(argv: Sequence[str]) -> LoadedConfig:
    """Read a command's options on top of the preset or file that --config names.

    --help and each of QUESTIONS print and raise SystemExit(0). Raises ConfigError for anything unknown, contradictory
    or out of bounds.
    """
    _answer(argv)
    lower = read_layers(config_name(argv))
    command = parse_command_line(argv, shown=merge(lower).values)
    if command.world_size is not None and command.world_size < 1:
        raise ConfigError(f"--world_size {command.world_size}: at least 1 rank is needed")
    layers = [*lower, Layer(values=command.values)]
    merged = merge(layers)
    try:
        config = build_config(merged.values)
        refuse_what_has_no_effect(layers, merged.values)
    except ConfigError as error:
        raise ConfigError("\n  ".join([str(error), *merged.remarks])) from None
    return LoadedConfig(
        config=config,
        dry_run=command.dry_run,
        world_size=command.world_size,
        remarks=merged.remarks,
        resume=command.resume,
    )


def _answer(argv: Sequence[str]) -> None:
    """Print the answer to a question such as --list_presets, if one is asked, and raise SystemExit(0)."""
    answers = {"list_presets": presets_text, "print_schema": schema_text, "version": version_text}
    asked = question(argv)
    if asked is not None:
        print(answers[asked]().rstrip("\n"))
        raise SystemExit(0)


def presets_text() -> str:
    """Return a line for each preset: its name, and what its file's first line says of it."""
    names = preset_names()
    width = max(map(len, names))
    lines = {name: (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0] for name in names}
    return "\n".join(f"{name:{width}}  {line.strip('#,. ')}" for name, line in lines.items())


def preset_names() -> list[str]:
    """Return the names of presets, which --config accepts besides files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def config_to_yaml(config: RunConfig) -> str:
    """Return every field with its value, as config_from_yaml reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def config_from_yaml(path: Path | str) -> RunConfig:
    """Read a configuration file, such as a run folder's config.yaml. Raises ConfigError."""
    values = merge(_read_file(Path(path), below=())).values
    try:
        return build_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ---- layers: flat dicts of dotted names ----


def read_layers(name: str) -> list[Layer]:
    """Return a preset or YAML file, and before it what its `base` names, by dotted names. Raises ConfigError."""
    if name in preset_names():
        return _read_file(PRESETS / f"{name}.yaml", below=())
    path = _user_path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file():
        return _read_file(path, below=())
    presets = preset_names()
    raise ConfigError(
        f"--config {name} is neither a preset ({', '.join(presets)}) nor a file{did_you_mean(name, presets)}"
    )


def _read_file(path: Path, *, below: tuple[Path, ...]) -> list[Layer]:
    """Read a file, and before it the preset or file that its `base` names. below: the files that led here."""
    document = {str(name): value for name, value in read_yaml_as_written(path).items()}
    base = meant(document.pop("base", None))
    layer = Layer(values=_flatten(document, source=path), is_preset=path.resolve().parent == PRESETS.resolve())
    if base is None:
        return [layer]
    base_path = PRESETS / f"{base}.yaml" if base in preset_names() else path.parent / _user_path(str(base))
    if not base_path.is_file():
        near = did_you_mean(str(base), preset_names())
        raise ConfigError(f"{path}: base {base} is neither a preset ({', '.join(preset_names())}) nor a file{near}")
    chain = (*below, path.resolve())
    if base_path.resolve() in chain:
        raise ConfigError(f"{path}: base {base} leads back to itself")
    return [*_read_file(base_path, below=chain), layer]


def _user_path(name: str) -> Path:
    try:
        return Path(in_home(name))
    except ValueError as error:
        raise ConfigError(f"{cut(name)}: {error}") from None


def _flatten(document: Mapping[str, Any], *, source: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in _named_values(document, source=source):
        try:
            path = field_path(name)
            value = settled(FIELDS[path], value)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        if path in values and not same_value(values[path], value):
            raise ConfigError(f"{source}: {path} is set twice with different values: {values[path]} and {value}")
        values[path] = value
    return values


def _named_values(document: Mapping[str, Any], *, source: Path) -> Iterable[tuple[str, Any]]:
    for key, value in document.items():
        if key not in SECTIONS:
            yield key, value
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif meant(value) is not None:
            raise ConfigError(
                f"{source}: {key} is a section and must contain names and values, not {shown(meant(value))}"
            )


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Validate values by dotted name. Raises ConfigError with each wrong field, its value and what would fit."""
    nested: dict[str, Any] = {section: {} for section in SECTIONS}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        (nested[section] if section else nested)[name] = value
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        problems = [_problem(one, values) for one in error.errors()]
        raise ConfigError("\n  ".join(["the configuration is not valid:", *problems])) from None


def _problem(error: Any, values: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    if location[:1] == ["objective"] and len(location) == 3:
        location = [location[0], location[2]]  # pydantic inserts the chosen class
    path = ".".join(location)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{path} must be given. {FIELDS[path].description}" if path in FIELDS else f"{path} must be given"
    if error["type"] == "extra_forbidden":
        return f"{path} = {shown(error['input'])}: objective.type {values.get('objective.type')} has no such field"
    if error["type"].startswith("union_tag"):
        choices = ", ".join(FIELDS["objective.type"].choices)
        return f"objective.type = {values.get('objective.type')}: one of {choices} would fit"
    if error["type"] == "value_error" and path not in FIELDS:
        return message  # the message of a rule between fields names them
    given = error["input"]
    return f"{path} = {cut(given) if isinstance(given, str) else shown(given)}: {message}"
