"""End a rank from outside its training: on request, a second signal, a lost launcher, or a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import local_rank_in, rank_in
from ds_dpo.errors import DsDpoError
from ds_dpo.process.departure import (
    EXIT_STATUS_OF_FAILURE,
    EXIT_STATUS_OF_HANG,
    EXIT_STATUS_OF_LOST_LEASE,
    EXIT_STATUS_OF_LOST_PARENT,
    SIGNAL_STATUS_BASE,
    leave,
    say,
    try_for_a_while,
)
from ds_dpo.process.launchers import Process, launchers_of
from ds_dpo.supervision.hang_watch import HangWatch, MicroBatchTimes, write_stacks
from ds_dpo.supervision.lease import LEASE_VARIABLE, Outcome, record_outcome
from ds_dpo.supervision.lease_watch import LeaseWatch
from ds_dpo.supervision.stop import StopRequest

# from the time when a rank finds a hang until it exits: the others find it too, or read it in the lease
MOMENT_SECONDS = 5.0


class Supervision:
    """Surrounds a rank's whole life, from before the heavy imports: `with Supervision(config, environ): ...`.

    stop: asked after each step. hang: gets a beat after each micro-batch. note: called with the reason if this rank
    leaves at once; the run's log once there is one.
    """

    def __init__(self, config: RunConfig, environ: Mapping[str, str]) -> None:
        settings, folder, launchers = config.supervision, Path(config.output_dir), launchers_of(os.getpid())
        self._rank, self._is_first_of_host = rank_in(environ), local_rank_in(environ) == 0
        self._lease = Path(environ[LEASE_VARIABLE]) if environ.get(LEASE_VARIABLE) else None
        self._hangs = False
        self._stacks = folder / "stacks" / f"rank_{self._rank}.txt"
        self.note: Callable[[str], None] = lambda reason: None
        self.stop = StopRequest(folder / "STOP", leave_at_once=self._leave_at_once)
        self.hang = HangWatch(
            MicroBatchTimes(factor=settings.hang_factor, floor_seconds=settings.hang_floor_seconds),
            long_work_seconds=60 * settings.collective_timeout_minutes,
            # nobody stops and continues a rank of a launch by hand
            ends_seized=self._lease is not None or bool(launchers),
            on_hang=self._leave_hanging,
        )
        self._watch = LeaseWatch(
            self._lease,
            launchers,
            lease_seconds=settings.lease_seconds,
            on_word=self._follow,
            on_lost_lease=self._leave_unsupervised,
            on_lost_launcher=self._leave_orphaned,
        )

    def __enter__(self) -> Supervision:
        self.stop.listen()
        self._watch.start()  # never closed: it also ends a rank that hangs at its end
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hang.close()
        self.stop.close()
        if isinstance(error, DsDpoError):
            self._record(error.exit_status, "stopped with an error message")
        elif isinstance(error, Exception):
            self._record(EXIT_STATUS_OF_FAILURE, f"failed with {kind.__name__ if kind else 'an error'}")

    def record_end(self, *, is_done: bool) -> None:
        """Record for the launcher that training is done, or stopped as asked, and saved.

        The first rank of each host does this, because each host may have its own launcher.
        """
        if self._is_first_of_host:
            self._record(0, "done" if is_done else "stopped as asked")

    def _record(self, status: int, how: str) -> None:
        if self._lease is None:
            return
        try:
            record_outcome(self._lease, Outcome(status=status, rank=self._rank, how=how))
        except OSError as error:
            say(f"rank {self._rank}: {how}; this cannot be recorded for the launcher ({error.strerror})")

    def _follow(self, word: str, launcher: str) -> None:
        if word == "stop":
            self.stop.ask()
        elif word == "hang" and not self._hangs:  # otherwise this rank exits already
            self._write_stacks("another rank has found a hang")
            self._leave(EXIT_STATUS_OF_HANG, f"another rank has found a hang; stacks are in {self._stacks.parent}")
        elif word == "end":
            # the launcher knows that, and why
            self._leave(EXIT_STATUS_OF_LOST_LEASE, f"exiting because the launcher ({launcher}) asks", is_known=True)

    def _leave_at_once(self, number: int) -> NoReturn:
        name = signal.Signals(number).name
        self._leave(SIGNAL_STATUS_BASE + number, f"second {name}: exiting at once, without saving")

    def _leave_unsupervised(self, why: str) -> NoReturn:
        self._leave(EXIT_STATUS_OF_LOST_LEASE, f"the launcher is gone or cut off ({self._lease}: {why})")

    def leave_displaced(self, why: str) -> NoReturn:
        """Exit because another start has taken the run folder from this one, which it took for dead."""
        self._leave(EXIT_STATUS_OF_LOST_LEASE, f"the run folder is lost: {why}")

    def _leave_orphaned(self, launcher: Process) -> None:
        if self.stop.is_asked(look_for_file=False):
            return  # Ctrl-C and `scancel` end plain `deepspeed` at once, while its ranks still save
        self._leave(EXIT_STATUS_OF_LOST_PARENT, f"its launcher {launcher.name} (process {launcher.pid}) is gone")

    def _leave_hanging(self, reason: str) -> NoReturn:
        self._hangs = True
        try_for_a_while(lambda: self._record(EXIT_STATUS_OF_HANG, reason))
        self._write_stacks(reason)
        time.sleep(MOMENT_SECONDS)
        self._leave(EXIT_STATUS_OF_HANG, f"{reason}, which is a hang; stacks are in {self._stacks.parent}")

    def _write_stacks(self, reason: str) -> None:
        try_for_a_while(lambda: write_stacks(self._stacks, reason))

    def _leave(self, status: int, how: str, *, is_known: bool = False) -> NoReturn:
        def last_words() -> None:
            say(f"rank {self._rank}: {how}; status {status}")
            if not is_known:
                self._record(status, how)
            self.note(f"rank {self._rank} left: {how}; status {status}")

        leave(status, last_words)
