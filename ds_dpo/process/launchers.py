"""Which processes a rank was started by, and whether they still live: one whose launcher died has to leave."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
NODE_LAUNCHER = "deepspeed.launcher.launch"  # one a host; the parent of its ranks
WORLD_INFO = "--world_info="  # of its arguments: the slots of each host, in the order of ranks
# where a look upwards from it ends: what lies beyond is the user's shell, which may well end before the run
HEADS = ("deepspeed", "deepspeed.launcher.runner")
TORCH_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
SLURM_STEP = "slurmstepd"
MOST_LEVELS = 4


@dataclass(frozen=True)
class Process:
    """A process and when it started, in the kernel's ticks, since ids are given again."""

    pid: int
    started: int
    name: str


def launchers_of(pid: int, *, proc: Path = PROC) -> list[Process]:
    """Return the processes whose end is the end of a rank's launch, its parent first; [] where it has no launcher.

    With DeepSpeed's launcher of this host they go on upwards to its runner, or to the ssh daemon through which the
    runner reached this host.
    """
    parent = _parent(pid, proc)
    if parent is None:
        return []
    if NODE_LAUNCHER in _arguments(parent.pid, proc):
        return [parent, *_up_to_head(parent, proc)]
    is_launcher = parent.name.startswith(SLURM_STEP) or _runs(parent, TORCH_LAUNCHERS, proc)
    return [parent] if is_launcher else []


def _up_to_head(process: Process, proc: Path) -> list[Process]:
    """Return what lies above a process up to the head of its launch; [] where there is none near."""
    above: list[Process] = []
    for _ in range(MOST_LEVELS):
        parent = _parent(process.pid, proc)
        if parent is None:
            break
        above.append(parent)
        if parent.name.startswith("sshd") or _runs(parent, HEADS, proc):
            return above
        process = parent
    return []


def _runs(process: Process, programs: Sequence[str], proc: Path) -> bool:
    """Tell whether a process is the Python that runs one of these: by a path of that name, or by -m."""
    return any(Path(argument).name in programs for argument in _arguments(process.pid, proc)[:4])


def hosts_of_ranks(pid: int, *, proc: Path = PROC) -> list[str] | None:
    """Return each rank's host, by the hostfile's names that DeepSpeed's launcher was told; None without that one."""
    parent = _parent(pid, proc)
    arguments = [] if parent is None else _arguments(parent.pid, proc)
    told = next((text.removeprefix(WORLD_INFO) for text in arguments if text.startswith(WORLD_INFO)), None)
    if told is None:
        return None
    slots: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(told))
    return [host for host, used in slots.items() for _ in used]


def first_dead(processes: list[Process], *, proc: Path = PROC) -> Process | None:
    """Return the first of them that has ended, None where all live."""
    return next((process for process in processes if not is_alive(process, proc=proc)), None)


def is_alive(process: Process, *, proc: Path = PROC) -> bool:
    """Tell whether this very process still runs; one that waits to be reaped does not."""
    stat = _stat(process.pid, proc)
    return stat is not None and stat[1] not in ("Z", "X") and int(stat[20]) == process.started


def process_of(pid: int, *, proc: Path = PROC) -> Process | None:
    """Return what is known of a process, None where there is none."""
    stat = _stat(pid, proc)
    return None if stat is None else Process(pid=pid, started=int(stat[20]), name=stat[0])


def parent_id(pid: int, *, proc: Path = PROC) -> int | None:
    """Return the id of a process's parent, None where there is no such process."""
    stat = _stat(pid, proc)
    return None if stat is None else int(stat[2])


def _parent(pid: int, proc: Path) -> Process | None:
    parent = parent_id(pid, proc=proc)
    return process_of(parent, proc=proc) if parent else None  # 0: it lies outside this pid namespace


def _stat(pid: int, proc: Path) -> list[str] | None:
    """Return /proc/PID/stat from the second field on: the name, the state, the parent, ..., the start at place 20."""
    try:
        text = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")  # a name may hold spaces and brackets
    return [name, *rest.split()]


def _arguments(pid: int, proc: Path) -> list[str]:
    try:
        return (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
