"""The processes of the bench's hosts, seen and ended from outside of them: by host, by role, by id."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from two_hosts import HOSTS, Bench

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process as the machine sees it; started: in the kernel's ticks, since ids are given again."""

    pid: int
    started: int
    host: str
    arguments: tuple[str, ...]
    rank: str | None

    @property
    def role(self) -> str | None:
        """What it is to a launch, by the names of fault_moves.Signal; None for anything else."""
        program = Path(self.arguments[0]).name
        if program.startswith("python"):
            if "ds_dpo/train.py" in self.arguments and self.rank is not None:
                return f"rank {self.rank}"
            modules = {"deepspeed.launcher.runner": "runner", "deepspeed.launcher.launch": f"node {self.host}"}
            for module, role in modules.items():
                if module in self.arguments:
                    return role
            return "launch.py" if "scripts/launch.py" in self.arguments else None
        if program.startswith("pdsh"):
            return "pdsh"
        if program == "ssh" and self.host == "head":
            return next((f"ssh {host}" for host in HOSTS if host in self.arguments), None)
        # the daemon of a connection calls itself `sshd: USER@notty`
        return f"sshd {self.host}" if self.arguments[0].startswith("sshd: ") else None

    def __str__(self) -> str:
        return f"{self.role or ' '.join(self.arguments)[:60]} on {self.host} (process {self.pid})"


class HostProcesses:
    """What runs on each host beside what came up with it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._namespaces: dict[str, str] = {}
        self._at_rest: set[tuple[int, int]] = set()

    def take_rest(self) -> None:
        """Take what runs now for what runs when nothing does; after each start of the bench."""
        self._namespaces = {_namespace(self._bench.first_process(host)) or "": host for host in HOSTS}
        self._at_rest = set()
        self._at_rest = {(process.pid, process.started) for process in self.all()}

    def all(self) -> list[Process]:
        """Return the living processes of all hosts, without those at rest."""
        found = [self._process(int(name)) for name in os.listdir(PROC) if name.isdecimal()]
        return [each for each in found if each is not None and (each.pid, each.started) not in self._at_rest]

    def find(self, role: str) -> Process | None:
        """Return the process of a role: the first of its kind, where it has forked."""
        found = [process for process in self.all() if process.role == role]
        return min(found, key=lambda process: process.started, default=None)

    def _process(self, pid: int) -> Process | None:
        host = self._namespaces.get(_namespace(pid) or "-")
        if host is None:
            return None
        try:
            fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
            arguments = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environ = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            return None  # it has ended meanwhile
        arguments = [argument for argument in arguments if argument]
        if fields[0] in "ZX" or not arguments:
            return None
        rank = next((entry[5:].decode() for entry in environ if entry.startswith(b"RANK=")), None)
        return Process(pid=pid, started=int(fields[19]), host=host, arguments=tuple(arguments), rank=rank)


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(PROC / str(pid) / "ns" / "pid")
    except OSError:
        return None


def send(process: Process, number: signal.Signals) -> None:
    """Signal a process, unless it has ended. Its id cannot be another's: it was looked up a moment ago."""
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return
