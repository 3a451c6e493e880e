"""How a run is asked to stop; signals go to a process of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ds_dpo.supervision.stop import StopRequest

# Answers each line of standard input with whether it was asked to stop; "block" lets its main thread wait for ever, in
# code that runs none of Python's handlers, as in a collective whose other end is gone.
LISTENER = """
import ctypes, os, sys
from pathlib import Path
from ds_dpo.supervision.stop import StopRequest
def leave(number):
    os._exit(100 + number)
stop = StopRequest(Path("STOP"), leave_at_once=leave, repeat_seconds=float(sys.argv[1]))
stop.listen()
print("listening", flush=True)
for line in sys.stdin:
    if line == "fork\\n":
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), 15)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    print(stop.is_asked(look_for_file=False), flush=True)
    if line == "block\\n":
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@contextmanager
def listener(*, repeat_seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LISTENER, str(repeat_seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert answer(process) == "listening"
        try:
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str], word: str = "") -> str:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return answer(process)


def ask_until(process: subprocess.Popen[str], expected: str) -> None:
    """The signal is taken in by a thread."""
    deadline = time.monotonic() + 30
    while ask(process) != expected:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGINT), (signal.SIGINT,) * 2]
)
def test_a_signal_is_remembered_and_a_second_one_leaves_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with listener(repeat_seconds=0) as process:
        assert ask(process) == "False"
        process.send_signal(first)
        ask_until(process, "True")
        process.send_signal(second)
        assert process.wait(timeout=30) == 100 + second


def test_a_signal_that_comes_twice_is_one_request(tmp_path: Path) -> None:
    left: list[int] = []
    stop = StopRequest(tmp_path / "STOP", leave_at_once=left.append, repeat_seconds=2)
    for now in (100.0, 100.0, 101.9):
        stop.take(signal.SIGTERM, now)
        assert stop.is_asked(look_for_file=False)
        assert left == []
    stop.take(signal.SIGINT, 102.1)
    assert left == [signal.SIGINT]


def test_a_second_signal_ends_a_process_that_runs_no_handler_any_more() -> None:
    with listener(repeat_seconds=0) as process:
        assert ask(process, "block") == "False"
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while process.poll() is None:  # there is nobody to ask whether the first was heard
            process.send_signal(signal.SIGTERM)
            assert time.monotonic() < deadline
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
        assert process.returncode == 100 + signal.SIGTERM


def test_a_signal_to_a_forked_process_is_not_the_rank_s() -> None:
    with listener(repeat_seconds=0) as process:
        assert ask(process, "fork") == str(-signal.SIGTERM)
        assert ask(process) == "False"


def test_a_stop_file_is_seen_by_who_looks_and_cleared_once(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "STOP", leave_at_once=lambda number: None)
    assert not stop.is_asked(look_for_file=True)
    (tmp_path / "STOP").touch()
    assert stop.is_asked(look_for_file=True)
    assert not stop.is_asked(look_for_file=False)
    stop.clear_file()
    assert not stop.is_asked(look_for_file=True)
    stop.clear_file()
    assert list(tmp_path.iterdir()) == []


def test_a_file_from_before_the_start_is_no_request_of_this_start(tmp_path: Path) -> None:
    """It is followed after the first step, as ever; one that comes while models load is followed at once."""
    (tmp_path / "STOP").touch()
    stop = StopRequest(tmp_path / "STOP", leave_at_once=lambda number: None)
    assert stop.is_asked(look_for_file=True)
    assert not stop.is_asked_since_start(look_for_file=True)
    os.utime(tmp_path / "STOP", ns=(1, 1))  # touched again
    assert stop.is_asked_since_start(look_for_file=True)
    assert not stop.is_asked_since_start(look_for_file=False)
    stop.clear_file()
    assert not stop.is_asked_since_start(look_for_file=True)
    stop.ask()
    assert stop.is_asked_since_start(look_for_file=False)
