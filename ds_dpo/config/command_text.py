"""How the user starts programs of ds_dpo, for commands that a program prints: they work when they are pasted."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_dpo.errors import DsDpoError

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "ds-dpo"
# commands in the help texts of programs, as they are in a checkout
_SCRIPT = re.compile(r"\b(?:python )?scripts/(\w+)\.py\b")
_ON_RANKS = re.compile(r"\b(deepspeed [^\n]*?)(?:scripts|ds_dpo)/(\w+)\.py\b")
_LAUNCHED = re.compile(r"\b(launch [^\n]*?)ds_dpo/train\.py\b")
_TRAIN = re.compile(r"\b(?:python )?ds_dpo/train\.py\b")


def command_text(program: str, *arguments: object) -> str:
    """Return a command that starts a program of the package, quoted for a shell.

    program: its name, such as consolidate or data-stats.
    """
    return shlex.join([*_start(program), *map(str, arguments)])


@contextmanager
def commands_as_started() -> Iterator[None]:
    """Let an error's message, which names programs as in a checkout, name them as the user started this one."""
    try:
        yield
    except DsDpoError as error:
        error.args = (with_start(str(error)),)
        raise


def with_start(text: str) -> str:
    """Return a text whose commands, those of a checkout, fit how the user started this program."""
    if _is_in_checkout():
        return text
    text = _ON_RANKS.sub(lambda found: f"{found[1]}--module ds_dpo {_name(found[2])}", text)
    text = _SCRIPT.sub(lambda found: shlex.join(_start(_name(found[1]))), text)
    return _TRAIN.sub(shlex.join(_start("train")), _LAUNCHED.sub(r"\1train", text))


def _start(program: str) -> list[str]:
    if not _is_in_checkout():
        return ["python", "-m", "ds_dpo", program] if _started_as("__main__.py") else [ENTRY, program]
    folder = "ds_dpo" if program == "train" else "scripts"
    script = Path(folder, f"{program.replace('-', '_')}.py")
    return ["python", str(script if Path.cwd() == ROOT else ROOT / script)]


def _is_in_checkout() -> bool:
    """Whether scripts/ is beside the package, and this program was not started by its installed entry."""
    is_entry = _started_as(ENTRY) or _started_as("__main__.py")
    return not is_entry and (ROOT / "scripts" / "consolidate.py").is_file()


def _started_as(name: str) -> bool:
    return Path(sys.argv[0]).name == name


def _name(script: str) -> str:
    return script.replace("_", "-")
