"""A run that suffers case after case: each start goes on from what the one before has left, and is held against it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fault_run
from fault_cases import DAMAGES
from fault_moves import Case, Setup
from fault_processes import HostProcesses, Process
from fault_start import BALLAST, CaseFailure, Start
from two_hosts import HOSTS, Bench

REFERENCE_STEPS = 160
SEED_STEPS = 9  # three checkpoints to begin with
MARGIN_STEPS = 40  # before the end of the reference, a run begins anew
LAST_STEPS = 4
WITHIN_OF_END = 120.0


@dataclass
class Result:
    """What became of a case.

    seconds: from its last move until no process was left; ranks_seconds: until no rank was. saved: what to go on from.
    """

    name: str
    group: str
    setup: str
    commit: str
    date: str
    within: float
    ranks_within: float | None = None
    seconds: float | None = None
    ranks_seconds: float | None = None
    status: int | None = None
    saved: int | None = None
    resumed: int | None = None
    is_curve_equal: bool | None = None
    orphans: int = 0
    seen: str = ""

    @property
    def passed(self) -> bool:
        return not self.seen and self.resumed is not None and self.resumed == self.saved and bool(self.is_curve_equal)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def fail(self, text: str) -> None:
        self.seen = f"{self.seen}; {text}" if self.seen else text


@dataclass
class Place:
    """Where cases are played: the bench and what runs there, and a folder for runs and logs."""

    bench: Bench
    processes: HostProcesses
    folder: Path
    small_disk: Path

    def start_bench(self) -> None:
        self.bench.start()
        self.processes.take_rest()

    def restart_bench(self) -> None:
        self.bench.stop()
        self.start_bench()

    def bring_back(self) -> None:
        """Undo what a case did to the hosts."""
        for host in HOSTS[1:]:
            self.bench.run("head", "ip", "link", "set", f"v{host[1:]}", "up")
        if any(self.bench.run(host, "true").returncode for host in HOSTS):
            self.start_bench()  # a host that is off: all are brought up anew
        if left := self.processes.all():
            raise CaseFailure(f"left over: {names_of(left)}")


def costs_of(case: Case) -> int:
    """Return how many checkpoints the case's damage takes, where a start goes on from an earlier one."""
    return (DAMAGES[case.damage] or 0) if case.damage else 0


def names_of(processes: Sequence[Process]) -> str:
    return "; ".join(map(str, processes))


class Chain:
    """The run of one setup."""

    def __init__(self, name: str, setup: Setup, place: Place, *, report: Callable[[Result], None]) -> None:
        """report: takes each result once it is known, and again where more of it is."""
        self._name, self._setup, self._place, self._report = name, setup, place, report
        home = place.small_disk if setup.is_on_small_disk else place.folder
        self._run, self._checkpoints = home / f"run_{name}", home / f"run_{name}" / "checkpoints"
        self._logs = place.folder / "logs"
        self._logs.mkdir(exist_ok=True)
        self._reference = place.folder / f"reference_{setup.curve_of}"
        self._pending: list[Result] = []  # of cases whose next start has not been
        self._loading_seconds = 12.0

    # ---- runs that nothing happens to ----

    def prepare(self) -> None:
        """Train the uninterrupted run and the beginning of all others, unless they are there."""
        for folder, steps in ((self._reference, REFERENCE_STEPS), (self._seed, SEED_STEPS)):
            if len(fault_run.curve(folder)) != steps:
                shutil.rmtree(folder, ignore_errors=True)
                self._train(folder, steps)
        self._curve = fault_run.curve(self._reference)
        if left := fault_run.difference(fault_run.curve(self._seed), self._curve):
            raise CaseFailure(f"two uninterrupted runs differ: {left}")
        self._begin_anew()

    @property
    def _seed(self) -> Path:
        return self._place.folder / f"seed_{self._setup.curve_of}"

    def _train(self, folder: Path, steps: int) -> None:
        start = self._start(folder, f"{folder.name}", {"max_train_steps": steps}, faults="")
        start.wait(lambda: f"step {steps}/{steps}" in start.text, f"step {steps} of {folder.name}", seconds=1200)
        start.wait_until_gone(within=WITHIN_OF_END, since=time.monotonic())
        if start.status != 0:
            raise CaseFailure(f"{folder.name}: status {start.status}: {start.tail()}")

    def _begin_anew(self) -> None:
        shutil.rmtree(self._run, ignore_errors=True)
        shutil.copytree(self._seed, self._run)

    def _start(self, run: Path, name: str, options: dict[str, Any], *, faults: str) -> Start:
        return Start(
            self._place.bench,
            self._place.processes,
            run=run,
            slots=self._setup.slots,
            options={**self._setup.options, **options},
            faults=faults,
            log=self._logs / f"{self._name}_{re.sub(r'[^a-zA-Z0-9]+', '_', name)}.log",
            loading_seconds=self._loading_seconds,
        )

    # ---- cases ----

    def play(self, case: Case, result: Result) -> None:
        """Start the run, let the case happen, see how it ends; what it left is seen at the next start."""
        is_near_the_end = len(fault_run.curve(self._run)) > REFERENCE_STEPS - MARGIN_STEPS
        if is_near_the_end or not fault_run.has_enough(self._checkpoints, costs=costs_of(case)):
            self.finish()
        intact = self._damage(case, result)
        saved_before = fault_run.newest_valid(self._checkpoints)
        start = self._start(
            self._run, case.name, {"max_train_steps": REFERENCE_STEPS, **case.options}, faults=case.faults
        )
        try:
            self._suffer(case, start, result)
        except (CaseFailure, OSError) as failure:
            result.fail(str(failure))
        try:
            self._place.bring_back()
        except CaseFailure as failure:
            result.fail(str(failure))
            self._place.restart_bench()
        start.give_up()
        (self._run.parent / BALLAST).unlink(missing_ok=True)
        self._loading_seconds = start.loading_seconds
        self._judge_start(start, saved_before, result)
        if intact is not None:
            self._compare_refused(intact, result)
        if (self._run / "STOP").exists():
            result.fail("the STOP file is still there, and would stop the next start")
        result.saved = fault_run.newest_valid(self._checkpoints)
        for loss in fault_run.losses(saved_before, result.saved, start.text if start.status == 0 else ""):
            result.fail(loss)
        self._pending.append(result)
        self._report(result)
        if result.seen:
            self._set_aside(case.name)

    def _damage(self, case: Case, result: Result) -> Path | None:
        """Damage the checkpoints as the case says. Returns a copy of intact ones where none is left to go on from."""
        if not case.damage:
            return None
        intact = None
        before = fault_run.valid_steps(self._checkpoints)
        if case.is_refused:
            intact = self._place.folder / f"intact_{self._name}"
            shutil.rmtree(intact, ignore_errors=True)
            shutil.copytree(self._checkpoints, intact)
        fault_run.DAMAGE[case.damage](self._checkpoints)
        after, costs = fault_run.valid_steps(self._checkpoints), DAMAGES[case.damage]
        meant = [] if costs is None else before[costs:]
        if after != meant or (not after) != case.is_refused:
            result.fail(f"not the damage meant: valid were {before}, and now {after}")
        return intact

    def _suffer(self, case: Case, start: Start, result: Result) -> None:
        for move in case.moves[:-1]:
            start.do(move)
        start.do(case.moves[-1])
        since = time.monotonic()
        leaving = start.wait_until_gone(within=case.within, since=since)
        result.seconds, result.ranks_seconds = leaving.seconds, leaving.ranks_seconds
        result.status, result.orphans = start.status, len(leaving.late)
        if leaving.late:
            gone = f"gone after {result.seconds:.0f} s" if start.status is not None else "and the launch goes on"
            result.fail(f"left after {case.within:g} s ({gone}): {names_of(leaving.late)}")
        if case.ranks_within is not None and leaving.ranks_seconds > case.ranks_within:
            result.fail(f"the last rank was gone after {leaving.ranks_seconds:.0f} s, not {case.ranks_within:g}")
        is_fitting = result.status != 0 if case.statuses is None else result.status in case.statuses
        if not is_fitting:
            result.fail(f"status {result.status}, not {case.statuses or 'a failure'}: {start.tail()}")
        for pattern in case.must_say:
            if not re.search(pattern, start.text):
                result.fail(f"it does not say {pattern!r}: {start.tail()}")

    def _judge_start(self, start: Start, saved: int | None, result: Result) -> None:
        """Hold a start against what was there before it; the cases before wait for it to have gone on."""
        resumed = start.resumed
        if resumed is None:
            return
        if resumed != saved:
            result.fail(f"resumed from step {resumed}, and the newest valid checkpoint was {saved}")
        lines = fault_run.curve(self._run)
        left = fault_run.difference(lines, self._curve)
        if left is not None:
            result.fail(left)
        has_gone_on = start.has_stepped
        for earlier in self._pending:
            # not what it left: the next case may have damaged that before its start
            earlier.saved = saved
            earlier.resumed, earlier.is_curve_equal = resumed, left is None and has_gone_on
            self._report(earlier)
        if has_gone_on or left is not None:
            self._pending = []

    def _compare_refused(self, intact: Path, result: Result) -> None:
        """A start that is refused leaves the curve as it was; then the checkpoints are put back for the next."""
        lines = fault_run.curve(self._run)
        if left := fault_run.difference(lines, self._curve):
            result.fail(f"a refused start has changed the curve: {left}")
        shutil.rmtree(self._checkpoints)
        shutil.copytree(intact, self._checkpoints)

    def _set_aside(self, name: str) -> None:
        """Keep what a case has spoiled for whoever wants to look, and begin anew."""
        aside = self._place.folder / "failed" / re.sub(r"[^a-zA-Z0-9]+", "_", name)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self._run, aside)
        self.finish()

    def finish(self) -> None:
        """Train a few steps more, to an end, as the next start of the last case; then begin anew."""
        if self._pending:
            steps = max(len(fault_run.curve(self._run)), fault_run.newest_valid(self._checkpoints) or 0) + LAST_STEPS
            last, saved = self._pending[-1], fault_run.newest_valid(self._checkpoints)
            try:
                start = self._start(self._run, f"after_{last.name}", {"max_train_steps": steps}, faults="")
                start.wait(lambda: f"step {steps}/{steps}" in start.text, f"step {steps}, the last")
                late = start.wait_until_gone(within=WITHIN_OF_END, since=time.monotonic()).late
                if start.status != 0 or late:
                    last.fail(f"the next start: status {start.status}, left {len(late)} processes: {start.tail()}")
                self._judge_start(start, saved, last)
            except CaseFailure as failure:
                last.fail(f"the next start: {failure}")
                self._place.restart_bench()
            for result in self._pending:
                result.fail("no later start went on")
            for result in self._pending or [last]:
                self._report(result)
            self._pending = []
        self._begin_anew()
