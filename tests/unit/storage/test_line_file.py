"""Lines outlive a disk that refuses them, whole and in order; a file-size limit of a child process is the disk."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_dpo.run_folder.metrics import MetricsWriter
from ds_dpo.storage.line_file import LineFile


def in_child(work: Callable[[], None]) -> int:
    """Run in a process of its own and return its status; the limits that it sets die with it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (pytest's is a file with the same limit)
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stdout__)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def let_files_have(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_what_is_refused_follows_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("before\n")

    def fill_up() -> None:
        file = LineFile(path)
        file.write("one\n")
        let_files_have(13)  # 2 bytes of the next line
        for line in ("two\n", "three\n"):
            file.write(line)
        assert path.read_text() == "before\none\ntw"
        try:
            file.sync()
        except OSError:
            let_files_have(resource.RLIM_INFINITY)
            file.write("four\n")
            file.close()

    assert in_child(fill_up) == 0
    assert path.read_text() == "before\none\ntwo\nthree\nfour\n"


def test_metrics_go_on_on_a_full_disk_and_only_a_checkpoint_is_refused(tmp_path: Path) -> None:
    def fill_up() -> None:
        writer = MetricsWriter(tmp_path, last_step=0)
        writer.write({"step": 1, "loss": 0.5})
        let_files_have(1)
        for step in (2, 3):
            writer.write({"step": step, "loss": 0.5})
        try:
            writer.flush()
        except OSError:
            let_files_have(resource.RLIM_INFINITY)
            writer.write({"step": 4, "loss": 0.5})
            writer.flush()
            writer.close()

    assert in_child(fill_up) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [f'{{"step": {step}, "loss": 0.5}}' for step in (1, 2, 3, 4)]


def test_a_disk_that_takes_little_at_a_time_gets_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    file = LineFile(tmp_path / "log.txt")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1]))
        file.write("one\n")
        file.sync()
    assert (tmp_path / "log.txt").read_text() == "one\n"
    file.close()
