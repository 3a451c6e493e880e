"""A rank's thread that watches its launcher: the lease on the shared disk, and the processes that started the rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_dpo.process.launchers import Process, first_dead
from ds_dpo.supervision.lease import Notice, read_notice

LOOK_SECONDS = 1.0
# a disk that does not answer says nothing about the launcher, but a disk that never answers again ends the rank too
BLIND_FACTOR = 6


class LeaseJudge:
    """Decides from looks at a lease whether the launcher still renews it.

    Only time in which this process was awake counts. A process that was stopped and continued, or whose look took a
    minute, looks again before it judges.
    """

    def __init__(self, seconds: float) -> None:
        """seconds: the lease is lost after this time without a change."""
        self._seconds = seconds
        self._last: Notice | None = None
        self._has_changed = False
        self._unchanged = 0.0
        self._blind = 0.0

    def see(self, notice: Notice | None) -> None:
        """Record the result of a look, None if the file cannot be read."""
        self._blind = 0.0
        if notice is None:
            return
        if self._last is not None and notice.count != self._last.count:
            self._has_changed = True
            self._unchanged = 0.0
        self._last = notice

    def wait(self, seconds: float, *, has_looked: bool) -> None:
        """Add time that has passed. has_looked: whether a look returned in it."""
        awake = min(seconds, 2 * LOOK_SECONDS)
        if has_looked:
            self._unchanged += awake
        else:
            self._blind += awake

    @property
    def loss(self) -> str | None:
        """Why the lease is lost, or None.

        If this rank has never seen the lease change, the launcher was probably gone before the rank started, so wait
        only half as long.
        """
        patience = self._seconds if self._has_changed else self._seconds / 2
        if self._unchanged > patience:
            return f"it was not renewed for {patience:g} s"
        if self._blind > BLIND_FACTOR * self._seconds:
            return f"it could not be read for {BLIND_FACTOR * self._seconds:g} s"
        return None


class LeaseWatch:
    """The watching threads. Once started they run until the process ends."""

    def __init__(
        self,
        lease: Path | None,
        launchers: Sequence[Process],
        *,
        lease_seconds: float,
        on_word: Callable[[str, str], None],
        on_lost_lease: Callable[[str], None],
        on_lost_launcher: Callable[[Process], None],
    ) -> None:
        """Watch a lease and processes.

        lease: None if no launcher renews one. on_word: called with each new word of the lease and its launcher.
        on_lost_lease: called with the reason. on_lost_launcher: called with the process. All are called on a thread.
        """
        self._lease, self._launchers = lease, list(launchers)
        self._judge = LeaseJudge(lease_seconds)
        self._on_word, self._on_lost_lease, self._on_lost_launcher = on_word, on_lost_lease, on_lost_launcher
        self._word = "run"
        self._looks: list[Notice | None] = []

    def start(self) -> None:
        """Begin to watch."""
        if self._lease is not None:
            threading.Thread(target=self._look, args=(self._lease,), name="lease-look", daemon=True).start()
        if self._lease is not None or self._launchers:
            threading.Thread(target=self._run, name="lease-watch", daemon=True).start()

    def _look(self, lease: Path) -> None:
        """Read the lease repeatedly, on its own thread, because a disk may be slow."""
        while True:
            self._looks.append(read_notice(lease))
            time.sleep(LOOK_SECONDS)

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(LOOK_SECONDS)
            now = time.monotonic()
            self._follow(now - last)
            last = now

    def _follow(self, seconds: float) -> None:
        looks, self._looks = self._looks, []
        for notice in looks:
            self._judge.see(notice)
        newest = next((notice for notice in reversed(looks) if notice is not None), None)
        if newest is not None and newest.word != self._word:
            self._word = newest.word
            self._on_word(newest.word, newest.launcher)
        dead = first_dead(self._launchers)
        if dead is not None:
            self._on_lost_launcher(dead)
        if self._lease is not None:
            self._judge.wait(seconds, has_looked=bool(looks))
            if self._judge.loss is not None:
                self._on_lost_lease(self._judge.loss)
