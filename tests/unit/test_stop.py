"""How a run is asked to stop; signals go to a process of their own."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_dpo.stop import StopRequest

# Answers each line of standard input with whether it was asked to stop.
LISTENER = """
import sys
from pathlib import Path
from ds_dpo.stop import StopRequest
stop = StopRequest(Path(sys.argv[1]))
stop.listen()
print("listening", flush=True)
for line in sys.stdin:
    print(stop.is_asked(look_for_file=False), flush=True)
"""


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LISTENER, str(tmp_path / "STOP")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert answer(process) == "listening"
        yield process
        process.kill()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_a_second_one_ends_at_once(
    listener: subprocess.Popen[str], first: signal.Signals, second: signal.Signals
) -> None:
    assert ask(listener) == "False"
    listener.send_signal(first)
    assert ask(listener) == "True"
    listener.send_signal(second)
    assert listener.wait(timeout=30) == -second


def test_a_stop_file_is_seen_by_who_looks_and_cleared_once(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "STOP")
    assert not stop.is_asked(look_for_file=True)
    (tmp_path / "STOP").touch()
    assert stop.is_asked(look_for_file=True)
    assert not stop.is_asked(look_for_file=False)
    stop.clear_file()
    assert not stop.is_asked(look_for_file=True)
    stop.clear_file()
    assert list(tmp_path.iterdir()) == []
