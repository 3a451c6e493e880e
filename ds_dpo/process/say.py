"""How code says something to a person without knowing where the line goes: to a log, a terminal, or nowhere."""

from __future__ import annotations

from collections.abc import Callable

# Takes one line of text. A run passes RunLog.line, which speaks on rank 0 alone; a script passes print.
Say = Callable[[str], None]
