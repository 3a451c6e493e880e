"""Values as a user writes them: a word of YAML without quotes, or an argument of the command line.

Both are read by YAML 1.2's core schema, so that a value means the same in a file and on the command line: 010 is ten,
1:30 and 2024-01-01 are text, and so are yes, no, on and off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NULL = re.compile(r"(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$")
BASES = {"0o": 8, "0x": 16}
MOST_DIGITS = 400  # no number that is used is longer; Python refuses to read more than 4300 digits


@dataclass(frozen=True)
class Plain:
    """A value without quotes. text: as written, for a field that takes text. value: what it means otherwise."""

    text: str
    value: bool | int | float | str | None

    def __str__(self) -> str:
        return self.text


def plain(text: str) -> Plain:
    """Return a text with its meaning: nothing, a truth value, a number, or the text itself."""
    return Plain(text, _meaning(text))


def _meaning(text: str) -> bool | int | float | str | None:
    if NULL.match(text):
        return None
    if BOOL.match(text):
        return text.lower() == "true"
    if len(text) <= MOST_DIGITS and INT.match(text):
        base = BASES.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)
    return float(text) if FLOAT.match(text) else text
