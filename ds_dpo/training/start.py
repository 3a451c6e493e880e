"""The start of a run: a line before each long part, and an end between two parts if a stop is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.errors import StopAskedError
from ds_dpo.process.say import Say
from ds_dpo.supervision.stop import STOPPED


@dataclass(frozen=True, kw_only=True)
class Start:
    """Goes through the parts of a start. say: the run's log. is_asked: whether this rank was asked to stop."""

    say: Say
    is_asked: Callable[[], bool]

    def part(self, text: str) -> None:
        """Announce a part; all ranks call this. Raises StopAskedError on all of them if any was asked to stop."""
        if any(gather_objects(self.is_asked())):
            raise StopAskedError(STOPPED)
        self.say(text)

    def turn(self) -> None:
        """Look for a request on this rank alone, within `raised_everywhere` or `node_turns`.

        Raises StopAskedError, which these raise on all ranks.
        """
        if self.is_asked():
            raise StopAskedError(STOPPED)
