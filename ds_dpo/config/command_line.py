"""The command line: one option for each field, under its flat and its dotted name.

tyro 1.0 and pydantic-settings 2.16 were tried on this schema. tyro makes the objective a positional subcommand and
refuses --objective.beta without it. pydantic-settings suggests nothing for a mistyped name, cannot change the objective
of a preset, and its help shows the schema's defaults instead of the preset's. With both, the last of two contradicting
values wins silently. argparse over the table of fields solves all of this in less code.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from ds_dpo.config.command_text import with_start
from ds_dpo.config.fields import FIELDS, FieldSpec, field_path
from ds_dpo.config.names import ALIASES, FLAT_NAMES
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.config.plain_scalar import plain
from ds_dpo.config.values import settled
from ds_dpo.errors import ConfigError, shown

DEFAULT_CONFIG = "sdxl_pickapic"
# what is answered at once, whatever else is given
QUESTIONS = {
    "list_presets": "Print the presets that --config accepts and exit.",
    "print_schema": "Print the JSON schema of a run's YAML file and exit.",
    "version": "Print the version and exit.",
}
PROGRAM_OPTIONS = ("config", "dry_run", "world_size", "resume", "local_rank", "help", *QUESTIONS)
NEVER: Literal["never"] = "never"
MAX_STEP_DIGITS = 12
MAX_CHOICES_WIDTH = 70  # argparse does not break a list of choices over lines
RESUME_HELP = (
    "STEP: go on from the checkpoint of this step, and set later ones aside. never: refuse a folder that has "
    "checkpoints. [the newest valid checkpoint]"
)
SECTION_TITLES = {
    "": "common options",
    "model": "model: the model to train",
    "adapter": "adapter: low-rank layers beside a frozen denoiser",
    "data": "data: preference pairs",
    "diffusion": "diffusion: timesteps, noise, and weights of errors",
    "objective": "objective: the loss",
    "terms": "terms: terms added to the loss",
    "reference": "reference: the frozen copy of the model",
    "batch": "batch: pairs per step and per rank",
    "optimizer": "optimizer: AdamW and Lion, also in 8 bit",
    "ema": "ema: a moving average of the weights",
    "schedule": "schedule: learning rate over optimizer steps",
    "cadence": "cadence: when to log, save and draw images",
    "validation": "validation: images drawn during training",
    "held_out": "held_out: pairs that are evaluated during training and never trained on",
    "watchdog": "watchdog: what to do when training makes preferred images much worse",
    "non_finite": "non_finite: when losses or gradients that are not finite end the run",
    "supervision": "supervision: hangs, lost launchers, and how long ranks wait",
}


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The options that were given: the program's, and the fields' by dotted name, as text or lists of text.

    resume: the step of the checkpoint to go on from, or NEVER; None for the newest one.
    """

    config: str
    dry_run: bool
    world_size: int | None
    resume: int | Literal["never"] | None
    values: dict[str, Any]


def config_name(argv: Sequence[str]) -> str:
    """Return the value of --config.

    It is read before all other options, because --help shows the values of that configuration.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    found, _ = parser.parse_known_args(_canonical(argv, strict=False))
    if len(set(found.config)) > 1:
        raise ConfigError(
            f"--config is given twice: {' and '.join(found.config)}; a file can build on another one with `base`"
        )
    return found.config[0] if found.config else DEFAULT_CONFIG


def question(argv: Sequence[str]) -> str | None:
    """Return the first of QUESTIONS that is given, None without one."""
    plain = (argument[2:].replace("-", "_") for argument in argv if argument.startswith("--"))
    return next((name for name in plain if name in QUESTIONS), None)


def parse_command_line(argv: Sequence[str], *, shown: Mapping[str, Any]) -> CommandLine:
    """Read all options; --help prints the help and exits with status 0. shown: values that --help puts in brackets.

    Raises ConfigError for an unknown option, a missing value, or a field given twice with different values.
    """
    namespace = _build_parser(shown).parse_args(_canonical(argv, strict=True))
    values = {}
    for path in FIELDS:
        given = getattr(namespace, path)
        if given is None:
            continue
        if any(not same_value(given[0], other) for other in given[1:]):
            raise ConfigError(f"{path} is set twice with different values: {' and '.join(map(_shown, given))}")
        values[path] = settled(FIELDS[path], _as_written(given[0]))
    if namespace.world_size is not None and not namespace.dry_run:
        _option_path("world_size")  # raises, and names the option to use
    return CommandLine(
        config=config_name(argv),
        dry_run=namespace.dry_run,
        world_size=namespace.world_size,
        resume=None if namespace.resume is None else _checkpoint(namespace.resume),
        values=values,
    )


def _checkpoint(text: str) -> int | Literal["never"]:
    """Return the value of --resume: the step of a checkpoint, or NEVER."""
    if text == NEVER:
        return NEVER
    if not text.isascii() or not text.isdigit() or len(text) > MAX_STEP_DIGITS:
        raise ConfigError(f"--resume {shown(text)}: give the step of a checkpoint, such as 200, or {NEVER}")
    return int(text)


def same_value(first: Any, second: Any) -> bool:
    """Return whether both values mean the same, such as 1e-5 and 0.00001, or 'true' and True."""
    return _comparable(first) == _comparable(second)


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return [_comparable(part) for part in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).lower() if str(value).lower() in ("true", "false", "none", "null") else value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_written(argument: str | list[str]) -> Any:
    """Return an argument as a file's reader returns the same word; an empty one is text."""
    if isinstance(argument, list):
        return [_as_written(part) for part in argument]
    return plain(argument) if argument else argument


def _canonical(argv: Sequence[str], *, strict: bool) -> list[str]:
    """Return argv with each option under its dotted name. strict: refuse unknown options."""
    spelled = []
    for argument in argv:
        if not argument.startswith("--") or argument == "--":
            spelled.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        plain = name.replace("-", "_")
        if plain not in PROGRAM_OPTIONS:
            plain = _option_path(name) if strict else f"{plain}."  # no option's name ends with a dot
        spelled.append(f"--{plain}{equals}{value}")
    return spelled


def _option_path(name: str) -> str:
    try:
        return field_path(name, other_names=PROGRAM_OPTIONS)
    except ConfigError as error:
        raise ConfigError(f"option --{error}") from None


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def _build_parser(shown: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        usage=with_start(
            "deepspeed [--hostfile hostfiles/NAME] ds_dpo/train.py [--config NAME_OR_FILE] [--FIELD VALUE ...]"
        ),
        description="Align a text-to-image diffusion model to preferences with Diffusion-DPO on DeepSpeed. "
        "Brackets show the value in the chosen configuration. A star (*) marks an option that makes another run, with "
        "another output_dir, when it changes. Names may use - or _; --name=value and --name value are the same. The "
        "value none unsets an option.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )
    groups = {section: parser.add_argument_group(title) for section, title in SECTION_TITLES.items()}
    common = groups[""]
    common.add_argument("--config", metavar="NAME_OR_FILE", help=f"Preset or YAML file. [{DEFAULT_CONFIG}]")
    common.add_argument("--dry_run", action="store_true", help="Print the resolved configuration and exit.")
    common.add_argument("--resume", metavar="STEP|never", help=RESUME_HELP)
    common.add_argument("--world_size", type=int, metavar="N", help="With --dry_run: assume N ranks.")
    for name, text in QUESTIONS.items():
        common.add_argument(f"--{name}", action="store_true", help=text)
    common.add_argument("--local_rank", help="Set by some launchers and ignored.")
    for spec in FIELDS.values():
        flat = [name for name, path in FLAT_NAMES.items() if path == spec.path]
        group = common if flat else groups[spec.section]
        group.add_argument(
            *(f"--{name}" for name in [*flat, spec.path]),
            dest=spec.path,
            action="append",
            metavar=_metavar(spec),
            help=_help(spec, shown),
            **_number_of_values(spec),
        )
    return parser


def _number_of_values(spec: FieldSpec) -> dict[str, Any]:
    if spec.is_list:
        return {"nargs": "*"}
    return {"nargs": "?", "const": "true"} if spec.is_switch else {}


def _metavar(spec: FieldSpec) -> str:
    choices = "{" + ",".join([*spec.choices, *(["N"] if spec.has_number else [])]) + "}"
    if spec.choices:
        return choices if len(choices) <= MAX_CHOICES_WIDTH else "NAME"
    return {int: "N", float: "X", bool: "true|false"}.get(spec.kind, "TEXT")


def _help(spec: FieldSpec, shown: Mapping[str, Any]) -> str:
    mark = " *" if spec.is_identity else ""
    choices = f" One of {', '.join(spec.choices)}." if _metavar(spec) == "NAME" else ""
    value = shown.get(spec.path, spec.default)
    if isinstance(value, list) and len(value) > 2:
        value = f"{len(value)} values"
    present = f" [{_shown(value)}]" if value is not None else ""
    aliases = [f"--{alias}" for alias, path in ALIASES.items() if path == spec.path]
    also = f" (also {', '.join(aliases)})" if aliases else ""
    return (with_start(spec.description) + _objectives_with(spec) + choices + present + mark + also).replace("%", "%%")


def _objectives_with(spec: FieldSpec) -> str:
    """Return which objectives have an option of the objective section, and '' for any other field."""
    section, _, name = spec.path.rpartition(".")
    if section != "objective" or name == "type":
        return ""
    having = [kind for kind, fields in OBJECTIVE_SECTIONS.items() if name in fields.model_fields]
    return f" For {', '.join(having)}."
