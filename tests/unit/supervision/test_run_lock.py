"""One start holds a run folder; a lock that nobody holds any more is taken."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.errors import ConfigError
from ds_dpo.supervision.run_lock import LOCK_NAME, STALE_SECONDS, RunLock, _look


def never(seconds: float) -> None:
    raise AssertionError("no wait is needed")


class Waits:
    """Counts the seconds that were waited, and does something at each wait."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.seconds, self._then = 0.0, then

    def __call__(self, seconds: float) -> None:
        self.seconds += seconds
        self._then()


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


DEAD = ended_process()


def left(folder: Path, name: str = LOCK_NAME, **facts: Any) -> Path:
    """A lock as a holder with these facts has left it."""
    folder.mkdir(exist_ok=True)
    lock = RunLock(folder)
    own = {**lock._own.__dict__, **facts}
    path = folder / name
    path.write_bytes(f"{3:012d}\n{json.dumps(own)}\n".encode())
    return path


def renew(path: Path) -> None:
    """Write the next count, as the holder does."""
    content = path.read_bytes()
    path.write_bytes(f"{int(content[:12]) + 1:012d}".encode() + content[12:])


def test_the_second_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with RunLock(folder, wait=never) as first:
        first.take()
        since = json.loads((folder / LOCK_NAME).read_text().splitlines()[1])["since"]
        with RunLock(folder, wait=never) as second, pytest.raises(ConfigError) as refused:
            second.take()
        said = str(refused.value)
        assert (
            f"output_dir {folder} is in use by another start, on {os.uname().nodename}, process {os.getpid()}" in said
        )
        assert f"since {since}" in said
        assert (folder / LOCK_NAME).exists(), "one that was refused takes nothing away"
    assert list(tmp_path.iterdir()) == [], "folders that were made for the lock are gone"
    with RunLock(folder, wait=never) as third:
        third.take()
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_one_that_never_took_it_releases_nothing(tmp_path: Path) -> None:
    path = left(tmp_path)
    with RunLock(tmp_path):
        pass
    assert path.exists()


@pytest.mark.parametrize("facts", [{"pid": DEAD}, {"started": 1}], ids=["ended", "its id is another's now"])
def test_a_dead_holder_on_this_machine_is_replaced_at_once(tmp_path: Path, facts: dict[str, int]) -> None:
    left(tmp_path, **facts)
    with RunLock(tmp_path, wait=never) as lock:
        lock.take()
        seen = _look(tmp_path / LOCK_NAME)
        assert seen is not None
        assert seen.name == lock.nonce
        assert os.listdir(tmp_path) == [LOCK_NAME]


def test_a_holder_on_another_machine_is_judged_by_its_count(tmp_path: Path) -> None:
    facts = {"machine": "another boot", "host": "far", "pid": 77, "since": "2026-01-01T00:00:00+00:00"}
    path = left(tmp_path, **facts)
    waits = Waits(lambda: renew(path))
    with (
        RunLock(tmp_path, wait=waits) as lock,
        pytest.raises(ConfigError, match="on far, process 77, since 2026-01-01"),
    ):
        lock.take()
    assert waits.seconds <= 2
    waits = Waits()
    said: list[str] = []
    with RunLock(tmp_path, wait=waits, say=said.append) as lock:
        lock.take()
    assert waits.seconds == STALE_SECONDS
    assert said == [f"{path} exists: looking for up to 20 s whether the start on far, process 77, is still there"]


@pytest.mark.parametrize("content", [b"", b"000000000001\n", b"\xff\x00", b"1\n[1]\n", b"1\n" + b"[" * 9000])
def test_a_file_that_is_no_lock_is_replaced_after_the_same_time(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_NAME).write_bytes(content)
    waits = Waits()
    with RunLock(tmp_path, wait=waits) as lock:
        lock.take()
    assert waits.seconds == STALE_SECONDS


def test_a_nonce_leads_nowhere_else(tmp_path: Path) -> None:
    left(tmp_path, nonce="../../outside", pid=DEAD)
    with RunLock(tmp_path, wait=Waits()) as lock:
        lock.take()


def test_a_holder_whose_launcher_is_gone_is_waited_for(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = int(Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[19])
    left(tmp_path, pid=holder.pid, started=started, launchers=[[ended_process(), 1]])

    def end() -> None:
        holder.communicate(b"\n")

    waits = Waits(end)
    with RunLock(tmp_path, wait=waits) as lock:
        lock.take()
    assert waits.seconds < 2


def test_what_a_start_left_that_was_killed_while_it_took_over_is_no_hindrance(tmp_path: Path) -> None:
    path = left(tmp_path, pid=DEAD)
    seen = _look(path)
    assert seen is not None
    left(tmp_path, f"{LOCK_NAME}.{seen.name}", pid=DEAD)
    with RunLock(tmp_path, wait=never) as lock:
        lock.take()
        assert os.listdir(tmp_path) == [LOCK_NAME]


def test_of_many_that_find_a_dead_holder_one_gets_the_folder(tmp_path: Path) -> None:
    for _ in range(20):
        left(tmp_path, pid=DEAD)
        locks = [RunLock(tmp_path) for _ in range(8)]
        everyone = threading.Barrier(len(locks))
        taken: list[RunLock] = []

        def attempt(lock: RunLock, everyone: threading.Barrier = everyone, taken: list[RunLock] = taken) -> None:
            everyone.wait(60)
            try:
                lock.take()
                taken.append(lock)
            except ConfigError:
                pass

        threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        (winner,) = taken
        assert os.listdir(tmp_path) == [LOCK_NAME]
        winner.release()


def test_rank_0_takes_over_what_its_launcher_holds(tmp_path: Path) -> None:
    with RunLock(tmp_path, wait=never) as launchers:
        launchers.take()
        with RunLock(tmp_path, handed=launchers.nonce, wait=never) as own:
            own.take()
            taker = launchers._renew()
            assert taker is not None
            assert taker.nonce == own.nonce
            assert own._renew() is None
            launchers.release()
            assert (tmp_path / LOCK_NAME).exists()
        assert list(tmp_path.iterdir()) == []


def test_the_count_grows_and_a_removed_lock_comes_back(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    with RunLock(tmp_path, wait=never) as lock:
        lock.take()
        before = path.read_bytes()
        lock._renew()
        after = path.read_bytes()
        assert int(after[:12]) > int(before[:12])
        assert after[12:] == before[12:]
        path.unlink()
        lock._renew()
        with RunLock(tmp_path, wait=never) as second, pytest.raises(ConfigError, match="is in use"):
            second.take()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock = RunLock(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"output_dir .*file/run cannot be written \(Not a directory\)"):
        lock.take()


def test_patience_outlasts_a_holder_that_leaves(tmp_path: Path) -> None:
    first = RunLock(tmp_path, wait=never)
    first.take()
    with RunLock(tmp_path, wait=Waits(first.release)) as second:
        second.take(patience_seconds=60)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "run.lock is a named pipe, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "run.lock is a device, not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "run.lock is a link to nothing"),
        (Path.mkdir, "Is a directory"),
    ],
)
def test_what_is_no_lock_is_refused_at_once(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path / LOCK_NAME)
    with pytest.raises(ConfigError, match=said):
        RunLock(tmp_path, wait=never).take()
