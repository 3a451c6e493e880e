"""One start of a run by scripts/launch.py on the bench: what it says, waiting for moments of it, acting on it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_moves as moves
from fault_processes import HostProcesses, Process, send
from two_hosts import ROOT, Bench

PATIENCE_SECONDS = 300.0  # with a moment that does not come: two cores may be busy with other things
LOOK_SECONDS = 0.02
USUAL_LOADING_SECONDS = 12.0
BALLAST = "ballast"
SPARE_BYTES = 64 * 2**10


class CaseFailure(Exception):
    """What was seen is not what must be."""


@dataclass
class Leaving:
    """How a launch ended. seconds: until nothing of it was left; ranks_seconds: until no rank was.

    late: who was still there when time was up.
    """

    seconds: float = 0.0
    ranks_seconds: float = 0.0
    late: list[Process] = field(default_factory=list)


class Start:
    """A launch in progress. resumed: the step that it says it goes on from; step: the last one that has ended.

    has_stepped: one of its own has.
    """

    def __init__(
        self,
        bench: Bench,
        processes: HostProcesses,
        *,
        run: Path,
        slots: int,
        options: Mapping[str, Any],
        faults: str,
        log: Path,
        loading_seconds: float = USUAL_LOADING_SECONDS,
    ) -> None:
        """loading_seconds: what a start took last time from its ranks' begin to the first step's end."""
        self._bench, self._processes = bench, processes
        self.run, self._log = run, log
        self.loading_seconds = loading_seconds
        self.text = ""
        self.resumed: int | None = None
        self.step = 0
        self._num_bytes = 0
        self._ranks_began: float | None = None
        self.has_stepped = False
        hostfile = log.with_suffix(".hosts")
        hostfile.write_text("".join(f"{host} slots={slots}\n" for host in ("n1", "n2")))
        arguments = [f"--{name}={value}" for name, value in {"output_dir": run, **options}.items()]
        program = [sys.executable, "scripts/launch.py", "--hostfile", str(hostfile), "ds_dpo/train.py", *arguments]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                bench.command("head", *program),
                env=bench.environ(DS_DPO_FAULT=faults, TF_CPP_MIN_LOG_LEVEL="3"),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def status(self) -> int | None:
        """The launch's exit status; as Popen has it, None while it runs."""
        return self._process.poll()

    def look(self) -> None:
        """Take in what the launch has said since the last look."""
        with self._log.open("rb") as file:
            file.seek(self._num_bytes)
            new = file.read()
        if not new:
            return
        self._num_bytes += len(new)
        self.text += new.decode(errors="replace")
        resumed = re.search(r"resumed from step (\d+),", self.text)
        if resumed and self.resumed is None:
            self.resumed = self.step = int(resumed[1])
        steps = re.findall(r"step +(\d+)/\d+  loss", self.text)
        if steps:
            if not self.has_stepped and self._ranks_began is not None:
                self.loading_seconds = time.monotonic() - self._ranks_began
            self.has_stepped = True
            self.step = int(steps[-1])

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for something of a launch that goes on. Raises CaseFailure where it ends before, or time is up."""
        until = time.monotonic() + seconds
        while True:
            has_ended = self.status is not None
            self.look()
            if condition():
                return
            if has_ended:
                raise CaseFailure(f"left with status {self.status} before: {what}; {self.tail()}")
            if time.monotonic() > until:
                raise CaseFailure(f"not within {seconds:g} s: {what}; {self.tail()}")
            time.sleep(LOOK_SECONDS)

    def tail(self) -> str:
        """The last words that say something."""
        said = [line.strip() for line in self.text.splitlines() if re.search(r"rror|launch:|rank \d+:|FAILED", line)]
        return " | ".join(line[:200] for line in (said or self.text.splitlines())[-4:])

    def do(self, move: moves.Move) -> None:
        """Wait for what a move waits for, or do what it does."""
        ACTIONS[type(move)](self, move)

    def find(self, role: str) -> Process:
        """Return the process of a role, once it is there."""
        found: list[Process] = []

        def is_there() -> bool:
            found[:] = [process for process in [self._processes.find(role)] if process is not None]
            return bool(found)

        self.wait(is_there, f"{role} runs")
        return found[0]

    def _steps(self, move: moves.Steps) -> None:
        # the first wait is for training itself
        self.wait(lambda: self.resumed is not None or self.has_stepped, "training begins")
        target = self.step + move.more
        self.wait(lambda: self.has_stepped and self.step >= target, f"step {target}")
        if move.share:
            self._pause(move.share * self._step_seconds())

    def _step_seconds(self) -> float:
        found = re.findall(r'"step_seconds": ([\d.]+)', (self.run / "metrics.jsonl").read_text())
        return float(found[-1]) if found else 0.0

    def _loading(self, move: moves.Loading) -> None:
        self.find("rank 0")
        self._ranks_began = time.monotonic()
        self._pause(move.share * self.loading_seconds)

    def _saving(self, move: moves.Saving) -> None:
        self.wait(lambda: any((self.run / "checkpoints").glob("partial_*")), "a checkpoint is being written")

    def _says(self, move: moves.Says) -> None:
        begin = len(self.text) if self.has_stepped else 0
        self.wait(lambda: re.search(move.pattern, self.text[begin:]), f"it says {move.pattern!r}")

    def _seconds(self, move: moves.Seconds) -> None:
        self._pause(move.seconds)

    def _pause(self, seconds: float) -> None:
        """Let time pass in a launch that goes on."""
        until = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= until, f"{seconds:.1f} s have passed")

    def _signal(self, move: moves.Signal) -> None:
        send(self.find(move.who), move.number)

    def _switch_off(self, move: moves.SwitchOff) -> None:
        os.kill(self._bench.first_process(move.host), signal.SIGKILL)

    def _cut(self, move: moves.Cut) -> None:
        self._bench.check("head", "ip", "link", "set", f"v{move.host[1:]}", "down")

    def _stop_file(self, move: moves.StopFile) -> None:
        (self.run / "STOP").touch()

    def _fill_disk(self, move: moves.FillDisk) -> None:
        path = self.run.parent / BALLAST
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # the run writes to it, too
            while shutil.disk_usage(path.parent).free > SPARE_BYTES:
                file.write(bytes(SPARE_BYTES))

    def _free_disk(self, move: moves.FreeDisk) -> None:
        (self.run.parent / BALLAST).unlink()

    def wait_until_gone(self, *, within: float, since: float) -> Leaving:
        """Wait until the launch and every process of it on every host have ended; `since` was the last move."""
        leaving = Leaving()
        while True:
            self.look()
            left = self._processes.all()
            leaving.seconds = time.monotonic() - since
            if any((process.role or "").startswith("rank ") for process in left):
                leaving.ranks_seconds = leaving.seconds
            if not left and self.status is not None:
                self.look()
                return leaving
            if leaving.seconds > within and not leaving.late:
                leaving.late = left
            if leaving.seconds > 2 * within:
                leaving.late = left
                return leaving
            time.sleep(LOOK_SECONDS)

    def give_up(self) -> None:
        """End the command that is waited for here; its host has been ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


ACTIONS: dict[type, Callable[[Start, Any], None]] = {
    moves.Steps: Start._steps,
    moves.Loading: Start._loading,
    moves.Saving: Start._saving,
    moves.Says: Start._says,
    moves.Seconds: Start._seconds,
    moves.Signal: Start._signal,
    moves.SwitchOff: Start._switch_off,
    moves.Cut: Start._cut,
    moves.StopFile: Start._stop_file,
    moves.FillDisk: Start._fill_disk,
    moves.FreeDisk: Start._free_disk,
}
