"""The lock of a run folder: one start holds it at a time, however and on whichever host of a shared disk it began.

The lock is a file that is created exclusively, which also works on NFS; flock does not. It names its holder, and the
holder overwrites a count in it every RENEW_SECONDS. A start that finds it asks the kernel whether the holder is alive
if both are on one machine, and else watches the count: clocks of two hosts are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ds_dpo.errors import ConfigError
from ds_dpo.outside import open_regular
from ds_dpo.process.launchers import Process, is_alive, launchers_of, process_of
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replace_file
from ds_dpo.supervision.stop import stop_command

LOCK_NAME = "run.lock"
LOCK_VARIABLE = "DS_DPO_LOCK"  # in the ranks' environment: the lock that their launcher holds for rank 0
RENEW_SECONDS = 2.0
STALE_SECONDS = 20.0  # a count that does not change for so long has no holder
LOOK_SECONDS = 0.5
COUNT = "{:012d}\n"
MOST_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock. nonce: different for each time that one is taken. since: local time, for messages.

    pid, started: its process and that one's start in the kernel's ticks. machine: its boot and its space of process
    ids. launchers: id and start of the processes without which it ends by itself.
    """

    nonce: str
    host: str
    machine: str
    pid: int
    started: int
    since: str
    launchers: tuple[tuple[int, int], ...]

    def is_running(self) -> bool:
        """Return whether its process is alive; for a holder on this machine."""
        return is_alive(Process(pid=self.pid, started=self.started, name=""))

    def is_leaving(self) -> bool:
        """Return whether a launcher of it is gone, so that it exits soon; for a holder on this machine."""
        return not all(is_alive(Process(pid=pid, started=started, name="")) for pid, started in self.launchers)


@dataclass(frozen=True)
class Seen:
    """A lock as it was read. content: its bytes. holder: None if they are not a lock's, such as just after creation."""

    content: bytes
    holder: Holder | None

    @property
    def name(self) -> str:
        """What distinguishes this lock from any later one in its place, whatever its count."""
        return hashlib.sha256(self.content).hexdigest()[:16] if self.holder is None else self.holder.nonce


class RunLock:
    """The lock of one run folder; `with RunLock(...) as lock` releases it at the end if `lock.take()` got it."""

    def __init__(
        self,
        folder: Path,
        *,
        handed: str | None = None,
        on_lost: Callable[[str], None] = lambda why: None,
        say: Say = lambda line: None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """folder: the run's. handed: nonce of a lock that this process may take over from its launcher.

        on_lost: called on a thread, with the reason, if another process has taken the lock from this one. say: takes a
        line before a long wait.
        """
        self._folder = folder.absolute()
        self._path = self._folder / LOCK_NAME
        self._handed, self._on_lost, self._say, self._wait = handed, on_lost, say, wait
        self._own = _this_process()
        self._made: list[Path] = []
        self._count = 0
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def nonce(self) -> str:
        """What LOCK_VARIABLE must hold for a process that may take this lock over."""
        return self._own.nonce

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def take(self, *, patience_seconds: float = 0.0) -> None:
        """Take the lock, also from a holder that is gone; makes the run folder.

        patience_seconds: how long to wait for a live holder to leave. Raises ConfigError that names a live holder, and
        if the folder cannot be written.
        """
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        until = time.monotonic() + patience_seconds
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (holder := self._try(self._path)) is not None and time.monotonic() < until:
                self._wait(LOOK_SECONDS)
        except OSError as error:
            self._remove_made()
            what = f"{self._path.name} {error.strerror}" if error.errno == errno.EINVAL else error.strerror
            raise ConfigError(f"output_dir {self._folder} cannot be written ({what})") from error
        if holder is not None:
            raise ConfigError(
                f"output_dir {self._folder} is in use by another start, on {holder.host}, process {holder.pid}, since "
                f"{holder.since}; `{stop_command(self._folder)}` makes it save and exit"
            )
        self._thread = threading.Thread(target=self._renew_until_over, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back, if this process has it, and remove folders that were made for it and are empty."""
        if self._thread is None:
            return
        self._is_over.set()
        self._thread.join(RENEW_SECONDS)
        self._thread = None
        with contextlib.suppress(OSError):
            seen = _look(self._path)
            if seen is not None and seen.name == self.nonce:
                self._path.unlink()
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # it was never made, or it is not empty any more
                folder.rmdir()

    # ---- taking ----

    def _try(self, path: Path) -> Holder | None:
        """Take a lock at a path. Returns its live holder, None if it was taken. Raises OSError."""
        while True:
            if self._create(path):
                return None
            seen = _look(path)
            if seen is None:
                continue
            if seen.name != self._handed and (holder := self._live_holder(path, seen)) is not None:
                return holder
            # only one start may replace a lock that nobody holds: the one that gets the lock on replacing it
            replacing = path.with_name(f"{path.name}.{seen.name}")
            if (holder := self._try(replacing)) is not None:
                return holder
            try:
                now = _look(path)
                if now is not None and now.name == seen.name:
                    replace_file(path, self._content(), sync=False)
                    return None
            finally:
                replacing.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._content())
        return True

    def _content(self) -> bytes:
        return COUNT.format(self._count).encode() + json.dumps(asdict(self._own)).encode() + b"\n"

    def _live_holder(self, path: Path, seen: Seen) -> Holder | None:
        """Return the holder of a lock if it lives, None if the lock is left over or gone."""
        holder = seen.holder
        is_here = holder is not None and holder.machine == self._own.machine
        if holder is not None and is_here:
            if not holder.is_running():
                return None
            if not holder.is_leaving():
                return holder
        whose = "another start" if holder is None else f"the start on {holder.host}, process {holder.pid},"
        self._say(f"{path} exists: looking for up to {STALE_SECONDS:g} s whether {whose} is still there")
        for _ in range(round(STALE_SECONDS / LOOK_SECONDS)):
            self._wait(LOOK_SECONDS)
            now = _look(path)
            if now is None or now.name != seen.name:
                return None if now is None else self._live_holder(path, now)
            if holder is not None and is_here and not holder.is_running():
                return None
            if holder is not None and not is_here and now.content != seen.content:
                return holder
        return holder if is_here else None

    # ---- holding ----

    def _renew_until_over(self) -> None:
        while not self._is_over.wait(RENEW_SECONDS):
            taker = self._renew()
            if taker is not None and not self._is_over.is_set():
                self._on_lost(f"process {taker.pid} on {taker.host} has taken {self._path}")
                return

    def _renew(self) -> Holder | None:
        """Write the next count. Returns the other holder if another process has taken the lock."""
        self._count += 1
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)  # a pipe in its place would block
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                self._create(self._path)  # somebody has removed it
            return None
        except OSError:
            return None  # a disk that does not answer; the next count comes in two seconds
        try:
            found = _parse(os.read(descriptor, MOST_BYTES)).holder
            if found is not None and found.nonce != self.nonce:
                return found
            os.pwrite(descriptor, COUNT.format(self._count).encode(), 0)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return None


def _this_process() -> Holder:
    pid = os.getpid()
    own = process_of(pid)
    return Holder(
        nonce=secrets.token_hex(8),
        host=platform.node(),
        machine=_machine(),
        pid=pid,
        started=0 if own is None else own.started,
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        launchers=tuple((process.pid, process.started) for process in launchers_of(pid)),
    )


def _machine() -> str:
    """Return what is equal for processes that can look for each other by process id, here and until the next boot.

    Containers of one machine have the same boot and may have the same host name, but not the same process ids.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, ValueError):
        return secrets.token_hex(8)  # nobody's: a lock is then judged by its count


def _look(path: Path) -> Seen | None:
    """Read a lock, None without one. It is opened each time, since an NFS client asks its server when it opens.

    Raises OSError for what is no lock: a pipe, a device, a link to nothing.
    """
    try:
        with open_regular(path) as file:
            return _parse(file.read(MOST_BYTES))
    except FileNotFoundError:
        if path.is_symlink():  # it can neither be read nor created
            raise OSError(errno.EINVAL, "is a link to nothing", str(path)) from None
        return None


def _parse(content: bytes) -> Seen:
    try:
        fields: dict[str, Any] = json.loads(content.partition(b"\n")[2])
        holder = Holder(
            nonce=_word(fields["nonce"]),
            host=_word(fields["host"]),
            machine=_word(fields["machine"]),
            pid=int(fields["pid"]),
            started=int(fields["started"]),
            since=_word(fields["since"]),
            launchers=tuple((int(pid), int(started)) for pid, started in fields["launchers"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return Seen(content, None)
    return Seen(content, holder if _is_plain(holder.nonce) else None)


def _word(value: object) -> str:
    return str(value)[:200]


def _is_plain(nonce: str) -> bool:
    """Return whether a nonce, which becomes part of a file's name, is one of this module."""
    return len(nonce) == 16 and set(nonce) <= set("0123456789abcdef")


def handed_in(environ: Mapping[str, str]) -> str | None:
    """Return the nonce of the lock that this process's launcher holds for it."""
    return environ.get(LOCK_VARIABLE) or None
