"""The processes below this one on this machine: found by their parents, ended by their ids."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from contextlib import suppress

from ds_dpo.process.launchers import PROC, Process, is_alive, parent_id, process_of

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose parent ends, so that it can be found and ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Make the kernel end this process when its parent ends; call it in a new child before it runs a program."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded at import, because a child must not load it between fork and exec


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def descendants(pid: int) -> dict[Process, Process | None]:
    """Return every living process below one, each with its parent if that is alive."""
    parents = {int(name): parent_id(int(name)) for name in os.listdir(PROC) if name.isdecimal()}
    below: dict[Process, Process | None] = {}
    generation = {pid}
    while generation:
        children = {child: parent for child, parent in parents.items() if parent in generation}
        for child, parent in children.items():
            process = process_of(child)
            if process is not None and is_alive(process):
                below[process] = process_of(parent) if parent is not None else None
        generation = set(children)
    return below


def kill(processes: Iterable[Process]) -> None:
    """Kill processes by SIGKILL; an id that now belongs to another process is left alone."""
    for process in processes:
        if is_alive(process):
            with suppress(ProcessLookupError):  # the process ended by itself
                os.kill(process.pid, signal.SIGKILL)


def reap() -> dict[int, int]:
    """Collect the exit statuses of all ended children, adopted ones included: by id, as subprocess has them."""
    statuses: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return statuses
        if pid == 0:
            return statuses
        statuses[pid] = os.waitstatus_to_exitcode(status)
