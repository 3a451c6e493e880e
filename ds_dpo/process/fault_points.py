"""Named points at which DS_DPO_FAULT, set by a test, makes a rank fail: killed, out of disk, or hanging."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from ds_dpo.errors import ConfigError

VARIABLE = "DS_DPO_FAULT"

# In the order in which ranks reach them; every rank does, unless the text says otherwise. While a checkpoint is written
# in the background, the thread that writes reaches those from save.copied to save.hashed.
FAULT_POINTS: dict[str, str] = {
    "step.begin": "an optimizer step begins",
    "step.backward": "the gradient of a step's first micro-batch exists, and the update too if it is the only one",
    "save.begin": "a checkpoint is due and none of it is on the disk",
    "save.copied": "the state is copied, so that training cannot change it, and none of it is written",
    "save.write": "one of this rank's files is about to be written",
    "save.written": "this rank's files are written but neither synced nor hashed",
    "save.hashed": "this rank's files are synced and hashed",
    "save.agreed": "every rank knows that all files exist",
    "save.moved_old": "an older folder of the same step is moved away (a damaged one before the manifest); rank 0 only",
    "save.manifest": "the manifest is written; rank 0 only",
    "save.renamed": "the folder has its final name; rank 0 only",
    "save.latest": "latest names the checkpoint; rank 0 only",
    "save.pruned": "older checkpoints are deleted; rank 0 only",
    "load.begin": "the search for checkpoints begins",
    "load.verified": "every rank knows which checkpoint verifies",
    "load.read": "the checkpoint is read into the engine",
}

_SPEC = re.compile(r"(?P<name>[^@#=]+)(?:@(?P<rank>\d+))?(?:#(?P<count>[1-9]\d*))?=(?P<action>.*)")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        time.sleep(3600)


def _refuse(code: int) -> Callable[[], None]:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    return refuse


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "hang": _hang,
    "enospc": _refuse(errno.ENOSPC),
    "erofs": _refuse(errno.EROFS),
    "edquot": _refuse(errno.EDQUOT),
    "eio": _refuse(errno.EIO),
}


@dataclass
class Fault:
    """An action for a rank (None: every rank) when it reaches a point for the times_left-th time from now."""

    name: str
    rank: int | None
    times_left: int
    action: str


def read_faults(text: str) -> list[Fault]:
    """Read NAME[@RANK][#COUNT]=ACTION, separated by commas: do ACTION the COUNT-th time (default 1) RANK is at NAME.

    Raises ConfigError for an unknown name or action, and for any other text.
    """
    return [_read_fault(part.strip()) for part in text.split(",") if part.strip()]


def _read_fault(text: str) -> Fault:
    match = _SPEC.fullmatch(text)
    if match is None:
        raise ConfigError(f"{VARIABLE} {text!r} must be NAME[@RANK][#COUNT]=ACTION, such as save.write@1#2=kill")
    for field, known in (("name", list(FAULT_POINTS)), ("action", list(ACTIONS))):
        if match[field] not in known:
            raise ConfigError(f"{VARIABLE} {text!r}: no {field} {match[field]!r}; {', '.join(known)} would fit")
    return Fault(
        name=match["name"],
        rank=None if match["rank"] is None else int(match["rank"]),
        times_left=int(match["count"] or 1),
        action=match["action"],
    )


_faults: list[Fault] = read_faults(os.environ.get(VARIABLE, ""))


def warnings() -> list[str]:
    """Return a line for the user if DS_DPO_FAULT is set here, which only a test should have; nothing otherwise."""
    if not _faults:
        return []
    asked = ", ".join(f"{fault.action} at {fault.name}" for fault in _faults)
    return [
        f"WARNING: {VARIABLE} IS SET, SO THIS RUN WILL FAIL ON PURPOSE ({asked}); unset it unless this tests faults"
    ]


def reach(name: str) -> None:
    """Do what DS_DPO_FAULT asks for at this point; do nothing if it is not set, as in every real run.

    Raises OSError if the action is a disk error.
    """
    if _faults:
        _act(name, rank=int(os.environ.get("RANK", "0")))


def _act(name: str, *, rank: int) -> None:
    here = [fault for fault in _faults if fault.name == name and fault.rank in (None, rank)]
    for fault in here:
        fault.times_left -= 1
    for fault in here:
        if fault.times_left == 0:
            print(f"fault point {name}, rank {rank}: {fault.action}", file=sys.stderr, flush=True)
            ACTIONS[fault.action]()
