"""What a case consists of: waits for a moment of a run, and what is done to it then. Words; fault_start.py acts."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Steps:
    """Wait until `more` more steps have ended, and then for a share of another one."""

    more: int
    share: float = 0.0


@dataclass(frozen=True)
class Loading:
    """Wait until the ranks run, and then for a share of the time that a start takes from there to its first step."""

    share: float


@dataclass(frozen=True)
class Saving:
    """Wait until a checkpoint is being written."""


@dataclass(frozen=True)
class Says:
    """Wait until the launch has printed something that a regular expression finds."""

    pattern: str


@dataclass(frozen=True)
class Seconds:
    """Let time pass, where that is what the case is about."""

    seconds: float


@dataclass(frozen=True)
class Signal:
    """Send a signal to one process: `rank 1`, `launch.py`, `runner`, `pdsh`, `ssh n2`, `node n2`, `sshd n2`."""

    who: str
    number: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class SwitchOff:
    """End a host with all of its processes."""

    host: str


@dataclass(frozen=True)
class Cut:
    """Take a host's network away, in silence: no connection is closed."""

    host: str


@dataclass(frozen=True)
class StopFile:
    """Put a STOP file into the run folder."""


@dataclass(frozen=True)
class FillDisk:
    """Leave hardly a byte free on the run folder's disk, which is a small one of its own."""


@dataclass(frozen=True)
class FreeDisk:
    """Take away what filled it."""


Move = Steps | Loading | Saving | Says | Seconds | Signal | SwitchOff | Cut | StopFile | FillDisk | FreeDisk


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run that suffers cases, one after another. options: of train.py. curve_of: the setup with the same curve."""

    slots: int = 1  # of each of the two hosts
    options: dict[str, Any] = field(default_factory=dict)
    curve_of: str
    is_on_small_disk: bool = False

    @property
    def ranks(self) -> int:
        return 2 * self.slots


@dataclass(frozen=True, kw_only=True)
class Case:
    """One start, and how it must end.

    faults: DS_DPO_FAULT of the start. options: of train.py, for this start alone. damage: done to the checkpoints
    before; is_refused: none that is left can be used. moves: in order; what the last one waits for or does ends the
    run. statuses: which may be the launch's; None: all but 0. within: seconds from the last move until no process is
    left on any host; ranks_within: until no rank is, where that is to be sooner. must_say: regular expressions that the
    launch's output holds in the end.
    """

    name: str
    group: str
    moves: tuple[Move, ...]
    setup: str = "two"
    faults: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    damage: str = ""
    is_refused: bool = False
    statuses: tuple[int, ...] | None = None
    within: float = 30.0
    ranks_within: float | None = None
    must_say: tuple[str, ...] = ()
