"""The parser of a program's own options: its help text fits how it was started, and --version is one of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_dpo.config.base import in_home
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
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(in_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
