"""The options of programs beside train: their parser, whose help fits how it was started, and their types."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ds_dpo.config.base import UNSETTING, in_home
from ds_dpo.config.command_text import command_text, with_start
from ds_dpo.config.version import version_text


def program_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a program by its name, such as data-stats. description: its module's docstring."""
    parser = argparse.ArgumentParser(
        prog=command_text(name),
        description=with_start(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version_text(), help="Print the version and exit.")
    return parser


def user_path(text: str) -> Path:
    """Return a path as a user writes it, with ~ and ~user replaced, for argparse."""
    return Path(_in_full(text, "path"))


def model_name(text: str) -> str:
    """Return a model as a user names it, by path or hub id, with ~ and ~user replaced, for argparse."""
    return _in_full(text, "model's name")


def model_name_or_none(text: str) -> str | None:
    """Return a model as model_name does, None for the word none, as in a configuration."""
    return None if text.lower() in UNSETTING else model_name(text)


def word_or_none(text: str) -> str | None:
    """Return a text, None for the word none, as in a configuration; for argparse."""
    return None if text.lower() in UNSETTING else _given(text, "text")


def count(text: str) -> int:
    """Return a whole number of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; a whole number of 1 or more would fit")
    return int(text)


def share(text: str) -> float:
    """Return a number above 0 and at most 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; a number above 0 and at most 1 would fit")
    return value


def margin(text: str) -> float:
    """Return a finite number of 0 or more, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; a number of 0 or more would fit")
    return value


def _given(text: str, what: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the {what} is empty")
    return text


def _in_full(text: str, what: str) -> str:
    try:
        return in_home(_given(text, what))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
