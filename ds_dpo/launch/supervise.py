"""Run DeepSpeed's runner as a child process, decide when its ranks must exit, and choose the exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from ds_dpo.launch.prepare import Prepared
from ds_dpo.process.departure import EXIT_STATUS_OF_FAILURE, EXIT_STATUS_OF_HANG, SIGNAL_STATUS_BASE
from ds_dpo.process.process_tree import adopt_orphans, descendants, die_with_parent, kill, reap
from ds_dpo.supervision.lease import RENEW_SECONDS, Lease, Outcome, Word
from ds_dpo.supervision.lease_watch import LOOK_SECONDS
from ds_dpo.supervision.stop import REPEAT_SECONDS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.5
CONNECTIONS_SECONDS = 2.0  # between looks at all processes of this machine
# from the first sign that a run is over to the word that ends the remaining ranks
FAILURE_SECONDS = 5.0  # a rank has failed: the others may also print an error
HOST_SECONDS = 5.0  # a host's connection has ended and another's has not
HANG_SECONDS = 15.0  # ranks write their stacks
DONE_SECONDS = 60.0  # training is done and saved: libraries clean up
# from that word to SIGKILL for the remaining processes of this machine
KILL_SECONDS = 15.0


def supervise(prepared: Prepared) -> int:
    """Run the launcher, renew its ranks' lease and handle signals. Returns the exit status when all has ended."""
    try:
        return _Supervisor(prepared).run()
    finally:
        if prepared.lock is not None:
            prepared.lock.release()


class _Supervisor:
    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._renewal = Renewal(prepared.lease)
        self._signals: list[tuple[int, float]] = []
        self._num_followed = 0
        self._left_at_once: int | None = None
        self._over_since: dict[str, float] = {}  # signs that the run is over, and when each was first seen
        self._ended_at: float | None = None
        self._was_killed = False
        self._next_look_at_connections = 0.0
        self._most_connections = 0
        self._num_connections = 0

    def run(self) -> int:
        adopt_orphans()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, self._note)
        signal.signal(signal.SIGTSTP, _refuse_to_pause)
        world_size = self._prepared.world_size
        ranks = "the ranks" if world_size is None else f"{world_size} rank{'s' * (world_size != 1)}"
        say(f"starting {ranks} by DeepSpeed's launcher, which imports PyTorch twice before they begin")
        # in its own session: Ctrl-C reaches this process alone, and the lease passes it on to the ranks
        runner = subprocess.Popen(
            self._prepared.command,
            env=self._prepared.environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        status: int | None = None
        try:
            self._renewal.start()
            while (status := reap().get(runner.pid)) is None:
                self._look(time.monotonic())
                time.sleep(POLL_SECONDS)
        finally:
            self._renewal.tell("end")
            self._clear_away()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # another signal would replace the exit status
        return self._conclude(status)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append((number, time.monotonic()))

    def _look(self, now: float) -> None:
        """Look for signals and signs of the end, and pass on to the ranks what follows."""
        self._follow_signals()
        outcome = self._prepared.lease.outcome()
        for sign in self._signs(outcome, now):
            if self._over_since.setdefault(sign, now) == now and sign == "hang":
                self._renewal.tell("hang")
        for sign, since in self._over_since.items():
            if self._ended_at is None and now - since > SECONDS_BY_SIGN[sign]:
                say(f"{WORDS_OF_SIGNS[sign]}; ending what is left of the run")
                self._end(now)
        if self._ended_at is not None and now - self._ended_at > KILL_SECONDS:
            self._was_killed = True
            _kill_what_is_left("DeepSpeed's launcher did not end by itself")

    def _signs(self, outcome: Outcome | None, now: float) -> list[str]:
        if outcome is not None and outcome.status == 0:
            return ["done"]
        signs = []
        if outcome is not None:
            signs.append("hang" if outcome.status == EXIT_STATUS_OF_HANG else "failure")
        if now >= self._next_look_at_connections:
            self._next_look_at_connections = now + CONNECTIONS_SECONDS
            self._num_connections = _num_connections()
            self._most_connections = max(self._most_connections, self._num_connections)
        if 0 < self._num_connections < self._most_connections:
            signs.append("host")
        return signs

    def _follow_signals(self) -> None:
        for number, at in self._signals[self._num_followed :]:
            name = signal.Signals(number).name
            if self._num_followed == 0:
                say(f"{name}: all ranks save at the same step and exit; a second signal makes them exit at once")
                self._renewal.tell("stop")
            elif self._left_at_once is None and at - self._signals[0][1] > REPEAT_SECONDS:
                say(f"second {name}: all ranks exit at once, without saving")
                self._left_at_once = number
                self._end(at)
            self._num_followed += 1

    def _end(self, now: float) -> None:
        self._ended_at = now
        self._renewal.tell("end")

    def _clear_away(self) -> None:
        """After the runner's end, wait for its processes on this machine, and kill those that stay."""
        deadline = time.monotonic() + KILL_SECONDS
        while descendants(os.getpid()) and time.monotonic() < deadline:
            reap()
            time.sleep(POLL_SECONDS)
        _kill_what_is_left("DeepSpeed's launcher exited before them")
        reap()

    def _conclude(self, status: int) -> int:
        outcome = self._prepared.lease.outcome()
        if self._left_at_once is not None:
            result, remark = SIGNAL_STATUS_BASE + self._left_at_once, None
        else:
            result, remark = conclude(status, outcome, was_killed=self._was_killed)
        if remark is not None:
            say(remark)
        if result == 0:
            self._renewal.remove()
        elif self._most_connections:
            time.sleep(3 * LOOK_SECONDS)  # until ranks on other hosts have read the last word and exited
        return result


SECONDS_BY_SIGN = {"failure": FAILURE_SECONDS, "host": HOST_SECONDS, "hang": HANG_SECONDS, "done": DONE_SECONDS}
WORDS_OF_SIGNS = {
    "failure": "a rank has failed and others are still running",
    "host": "the connection to one host has ended and others are still open",
    "hang": "a rank has found a hang",
    "done": f"training has ended, but processes are still running after {DONE_SECONDS:g} s",
}


def conclude(status: int, outcome: Outcome | None, *, was_killed: bool) -> tuple[int, str | None]:
    """Return the exit status, and a remark about it or None.

    status: the runner's, as subprocess has it. outcome: what a rank recorded. was_killed: the runner did not exit by
    itself.
    """
    said = None if outcome is None else f"rank {outcome.rank} says: {outcome.how}"
    if outcome is not None and outcome.status != 0:
        return outcome.status, said
    if status == 0 and outcome is None:
        return (
            EXIT_STATUS_OF_FAILURE,
            "DeepSpeed's launcher ended with status 0, but no rank has recorded that training ended",
        )
    if status == 0 or (was_killed and outcome is not None):
        return 0, None
    own = status if status > 0 else SIGNAL_STATUS_BASE - status
    return own, f"DeepSpeed's launcher exited with status {own}" + ("" if said is None else f", although {said}")


class Renewal:
    """Renews a lease on its own thread, so that a terminal or a slow list of processes does not delay it."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._lock = threading.Lock()
        self._is_failing = False
        self._is_over = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="renewal", daemon=True).start()

    def _run(self) -> None:
        while not self._is_over:
            time.sleep(RENEW_SECONDS)
            self._renew()

    def tell(self, word: Word) -> None:
        """Write a new word into the lease for the ranks; `end` is the last one."""
        if self._lease.word != "end":
            self._lease.word = word
        # on another thread, because a slow disk must not delay this one
        teller = threading.Thread(target=self._renew, daemon=True)
        teller.start()
        teller.join(POLL_SECONDS)

    def _renew(self) -> None:
        with self._lock:
            if self._is_over:
                return
            try:
                self._lease.renew()
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    say(f"{self._lease.path} cannot be renewed ({error.strerror}); the ranks exit if this continues")
                self._is_failing = True

    def remove(self) -> None:
        """Remove the lease: nobody reads it any more."""
        with self._lock:
            self._is_over = True
            self._lease.remove()


def _num_connections() -> int:
    """Return the number of hosts that pdsh is connected to, 0 if it is not used."""
    return sum(
        process.name == "ssh" and parent is not None and parent.name.startswith("pdsh")
        for process, parent in descendants(os.getpid()).items()
    )


def _kill_what_is_left(why: str) -> None:
    left = descendants(os.getpid())
    if left:
        say(f"{why}: ending {', '.join(sorted(f'{process.name} {process.pid}' for process in left))}")
        kill(left)


def _refuse_to_pause(number: int, frame: FrameType | None) -> None:
    say("ranks cannot be paused; Ctrl-C makes them save and exit")


def say(text: str) -> None:
    """Print a line of the launcher; ignores a terminal that is gone."""
    try:
        print(f"launch: {text}", file=sys.stderr, flush=True)
    except OSError:
        return
