"""The processes of this machine that come from this one: found by their parents, and ended by their ids."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

from ds_dpo.launchers import PROC, Process, is_alive, parent_id, process_of

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of whatever below this process loses its own, so that it can be found and ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends; for a new child, before it runs a program."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: a child between fork and exec must not


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def descendants(pid: int) -> dict[Process, int]:
    """Return every living process below one, with its parent's id."""
    parents = {int(name): parent_id(int(name)) for name in os.listdir(PROC) if name.isdecimal()}
    below: dict[Process, int] = {}
    newest = [pid]
    while newest:
        found = {child: parent for child, parent in parents.items() if parent is not None and parent in newest}
        newest = list(found)
        for child, parent in found.items():
            process = process_of(child)
            if process is not None and is_alive(process):
                below[process] = parent
    return below


def kill(processes: Mapping[Process, int]) -> None:
    """End processes by SIGKILL; one whose id now is another's is left alone."""
    for process in processes:
        if is_alive(process):
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself


def reap_orphans(*, but: int) -> None:
    """Let ended processes that came to this one go; `but`, a child of its own, is left to who waits for it."""
    for process, parent in descendants_waiting(os.getpid()).items():
        if parent == os.getpid() and process.pid != but:
            os.waitpid(process.pid, os.WNOHANG)
