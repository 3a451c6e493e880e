"""A launcher, its runner and its ranks as real processes: whoever ends, all end, and the status says why."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from repository import SUPPORT
from small_launch import SEEN

from ds_dpo.errors import ConfigError
from ds_dpo.launch.earlier import end_earlier_launches
from ds_dpo.launch.supervise import DONE_SECONDS, conclude
from ds_dpo.process.departure import EXIT_STATUS_OF_HANG, EXIT_STATUS_OF_LOST_LEASE
from ds_dpo.process.launchers import is_alive, parent_id, process_of
from ds_dpo.supervision.lease import Lease, Outcome, leases, read_notice

PROGRAM = SUPPORT / "small_launch.py"
DEADLINE_SECONDS = 120


class Launch:
    """launcher, runner, ranks: processes; output: what all of them say, to be read in lines."""

    def __init__(self, folder, kind):
        self.folder = folder
        self.log = folder / "output.txt"
        with self.log.open("w") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, str(PROGRAM), "launcher", str(folder), kind], stdout=output, stderr=output
            )
        self.wait_for(lambda: len(self.rank_ids()) == 2)
        self.ranks = [process_of(pid) for pid in self.rank_ids()]
        self.runner = process_of(parent_id(self.ranks[0].pid))
        (folder / SEEN).touch()

    def rank_ids(self):
        return [int(pid) for pid in re.findall(r"is process (\d+)", self.said())]

    def said(self):
        return self.log.read_text()

    def wait_for(self, is_so):
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def wait_until_all_are_gone(self):
        self.wait_for(lambda: not any(is_alive(process) for process in [self.runner, *self.ranks]))
        return self.launcher.wait(timeout=DEADLINE_SECONDS)


@contextmanager
def launch(folder, kind):
    run = Launch(folder, kind)
    try:
        yield run
    finally:
        for process in [run.runner, *run.ranks]:
            if is_alive(process):
                os.kill(process.pid, signal.SIGKILL)
        run.launcher.kill()
        run.launcher.wait()


def test_a_signal_lets_all_ranks_save_and_leaves_nothing_behind(tmp_path):
    with launch(tmp_path, "trains") as run:
        run.launcher.send_signal(signal.SIGTERM)
        assert run.wait_until_all_are_gone() == 0
        assert "rank 0 saved" in run.said()
        assert "rank 1 saved" in run.said()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["output.txt", SEEN]


@pytest.mark.slow
def test_a_second_signal_ends_what_does_not_save(tmp_path):
    with launch(tmp_path, "ignores_the_request") as run:
        run.launcher.send_signal(signal.SIGINT)
        run.wait_for(lambda: "all ranks save" in run.said())
        while run.launcher.poll() is None:
            run.launcher.send_signal(signal.SIGINT)  # those of the first 2 s are the same one again
            time.sleep(0.2)
        assert run.wait_until_all_are_gone() == 128 + signal.SIGINT
        assert "exit at once" in run.said()


@pytest.mark.slow
def test_ranks_of_a_killed_launcher_leave_and_the_next_one_knows(tmp_path):
    with launch(tmp_path, "trains") as run:
        run.launcher.kill()
        run.wait_until_all_are_gone()
        assert f"is gone or cut off ({next(leases(tmp_path))}: it was not renewed for" in run.said()
        assert f"status {EXIT_STATUS_OF_LOST_LEASE}" in run.said()
    waited = []
    (remark,) = end_earlier_launches(tmp_path, wait=waited.append)
    assert f"process {run.launcher.pid}) ended before its ranks" in remark
    assert end_earlier_launches(tmp_path, wait=waited.append) == []
    assert list(leases(tmp_path)) == []


@pytest.mark.slow
def test_ranks_of_a_killed_runner_leave_and_the_launcher_fails(tmp_path):
    with launch(tmp_path, "trains") as run:
        os.kill(run.runner.pid, signal.SIGKILL)
        assert run.wait_until_all_are_gone() == 128 + signal.SIGKILL
        assert "DeepSpeed's launcher exited with status 137" in run.said()
        assert f"exiting because the launcher ({platform.node()} {run.launcher.pid}) asks" in run.said()


def test_a_runner_that_claims_success_is_not_believed(tmp_path):
    with launch(tmp_path, "says_nothing") as run:
        assert run.wait_until_all_are_gone() == 1
        assert "no rank has recorded that training ended" in run.said()


@pytest.mark.slow
def test_a_hang_ends_all_with_every_rank_s_stacks(tmp_path):
    with launch(tmp_path, "hangs") as run:
        assert run.wait_until_all_are_gone() == EXIT_STATUS_OF_HANG
        for rank in range(2):
            stacks = (tmp_path / "stacks" / f"rank_{rank}.txt").read_text()
            assert "a micro-batch has taken more than 1 s" in stacks or "another rank has found a hang" in stacks
            assert f'{PROGRAM}", line' in stacks, "where the main thread stands"


@pytest.mark.slow
def test_a_runner_that_stays_when_all_is_done_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(quick_supervisor(tmp_path)), os.environ.get("PYTHONPATH", "")])
    )
    began = time.monotonic()
    with launch(tmp_path, "stays") as run:
        run.launcher.send_signal(signal.SIGTERM)
        assert run.wait_until_all_are_gone() == 0, "what was asked is done and saved"
        assert "processes are still running" in run.said()
    assert time.monotonic() - began < DONE_SECONDS, "the supervisor is not the impatient one"


def quick_supervisor(folder):
    """Let supervisors below be impatient: Python runs this file at its start."""
    place = folder / "quick"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[0:] == [] or 'launcher' in sys.orig_argv:\n"
        "    from ds_dpo.launch import supervise\n"
        "    supervise.KILL_SECONDS = 1.0\n"
        "    supervise.SECONDS_BY_SIGN['done'] = 1.0\n"
    )
    return place


def test_a_run_folder_in_use_is_refused(tmp_path):
    lease = Lease(tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by the launcher on \S+, process {os.getpid()}"):
        end_earlier_launches(tmp_path, wait=lambda seconds: lease.renew())
    assert read_notice(lease.path).word == "run"


@pytest.mark.parametrize(
    ("status", "outcome", "was_killed", "expected"),
    [
        (0, (0, "done"), False, 0),
        (0, None, False, 1),
        (0, (70, "hang"), False, 70),
        (255, (2, "refused"), False, 2),
        (247, None, False, 247),
        (-9, None, False, 137),
        (1, (0, "done"), False, 1),
        (-9, (0, "done"), True, 0),
        (-9, None, True, 137),
    ],
)
def test_a_rank_s_own_status_is_worth_more_than_the_runner_s(status, outcome, was_killed, expected):
    told = None if outcome is None else Outcome(status=outcome[0], rank=1, how=outcome[1])
    assert conclude(status, told, was_killed=was_killed)[0] == expected
