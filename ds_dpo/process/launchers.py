"""Find the processes that started a rank, and whether they are alive: a rank whose launcher died must exit."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
NODE_LAUNCHER = "deepspeed.launcher.launch"  # one per host; the parent of its ranks
WORLD_INFO = "--world_info="  # one of its arguments: the slots of each host, in the order of ranks
# the search upwards ends here: above is the user's shell, which may end before the run
HEADS = ("deepspeed", "deepspeed.launcher.runner")
TORCH_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
SLURM_STEP = "slurmstepd"
MOST_LEVELS = 4


@dataclass(frozen=True)
class Process:
    """A process and its start in the kernel's ticks, because process ids are reused."""

    pid: int
    started: int
    name: str


def launchers_of(pid: int, *, proc: Path = PROC) -> list[Process]:
    """Return the processes without which a rank's launch is over, its parent first; [] if it has no launcher.

    Above DeepSpeed's launcher of this host they include its runner, or the ssh daemon through which the runner reached
    this host.
    """
    parent = _parent(pid, proc)
    if parent is None:
        return []
    if NODE_LAUNCHER in _arguments(parent.pid, proc):
        return [parent, *_up_to_head(parent, proc)]
    is_launcher = parent.name.startswith(SLURM_STEP) or _runs(parent, TORCH_LAUNCHERS, proc)
    return [parent] if is_launcher else []


def _up_to_head(process: Process, proc: Path) -> list[Process]:
    """Return the processes above one, up to the head of its launch; [] if no head is near."""
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
    """Return whether a process is a Python that runs one of these programs, by its path or by -m."""
    return any(Path(argument).name in programs for argument in _arguments(process.pid, proc)[:4])


def hosts_of_ranks(pid: int, *, proc: Path = PROC) -> list[str] | None:
    """Return each rank's host under its name in the hostfile, from DeepSpeed's launcher; None without that launcher."""
    parent = _parent(pid, proc)
    arguments = [] if parent is None else _arguments(parent.pid, proc)
    info = next((text.removeprefix(WORLD_INFO) for text in arguments if text.startswith(WORLD_INFO)), None)
    if info is None:
        return None
    slots: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(info))
    return [host for host, used in slots.items() for _ in used]


def first_dead(processes: list[Process], *, proc: Path = PROC) -> Process | None:
    """Return the first process that has ended, None if all are alive."""
    return next((process for process in processes if not is_alive(process, proc=proc)), None)


def is_alive(process: Process, *, proc: Path = PROC) -> bool:
    """Return whether this process still runs; a zombie does not."""
    stat = _stat(process.pid, proc)
    return stat is not None and stat[1] not in ("Z", "X") and int(stat[20]) == process.started


def process_of(pid: int, *, proc: Path = PROC) -> Process | None:
    """Return a process by its id, None if there is none."""
    stat = _stat(pid, proc)
    return None if stat is None else Process(pid=pid, started=int(stat[20]), name=stat[0])


def parent_id(pid: int, *, proc: Path = PROC) -> int | None:
    """Return the id of a process's parent, None if there is no such process."""
    stat = _stat(pid, proc)
    return None if stat is None else int(stat[2])


def _parent(pid: int, proc: Path) -> Process | None:
    parent = parent_id(pid, proc=proc)
    return process_of(parent, proc=proc) if parent else None  # 0: the parent is outside this pid namespace


def _stat(pid: int, proc: Path) -> list[str] | None:
    """Return /proc/PID/stat from the second field: the name, the state, the parent, ..., the start at index 20."""
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
