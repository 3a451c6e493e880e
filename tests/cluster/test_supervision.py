"""Launchers that die over two hosts: every rank is gone within the time that is promised, and the next start works."""

import re
import subprocess
import sys
import time

import pytest
from two_hosts import NODES

from ds_dpo.process.departure import EXIT_STATUS_OF_LOST_PARENT

pytestmark = pytest.mark.launch
WITHIN_SECONDS = 30  # of any death
DEADLINE_SECONDS = 300
SETTINGS = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "pairs_per_step": 4,
    "micro_batch_pairs": 2,
    "max_train_steps": 100000,
    "cadence.log_every_steps": 1,
    "cadence.save_every_steps": 100000,
    "cadence.sample_every_steps": "none",
    "schedule.name": "constant",
    "schedule.warmup_steps": 0,
}


class Launch:
    """scripts/launch.py on the head, with a rank on each of both hosts that has trained a step."""

    def __init__(self, bench, out):
        self._bench, self._log = bench, out.with_suffix(".txt")
        hosts = out.with_name("hosts")
        hosts.write_text("n1 slots=1\nn2 slots=1\n")
        arguments = [f"--{name}={value}" for name, value in {**SETTINGS, "output_dir": out}.items()]
        command = [sys.executable, "scripts/launch.py", "--hostfile", hosts, "ds_dpo/train.py", *arguments]
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                bench.command("head", *command), env=bench.environ(), stdout=output, stderr=output
            )
        deadline = time.monotonic() + DEADLINE_SECONDS
        while "step      1/" not in self.said():
            assert time.monotonic() < deadline
            assert self._process.poll() is None, self.said()
            time.sleep(0.2)

    def said(self):
        return self._log.read_text()

    def kill(self, host, command):
        """Kill the process of a host whose command begins with this regular expression."""
        processes = [line.split(maxsplit=1) for line in self._bench.left_over(host)]
        (pid,) = (pid for pid, arguments in processes if re.match(command, arguments))
        self._bench.check(host, "kill", "-KILL", pid)

    def status_once_all_are_gone(self):
        self._bench.require_quiet(within=WITHIN_SECONDS)
        return self._process.wait(timeout=DEADLINE_SECONDS)


def test_whatever_dies_all_ranks_leave(bench, tmp_path):
    out = tmp_path / "run"
    launch = Launch(bench, out)
    launch.kill("head", r"\S+/python scripts/launch\.py")
    launch.status_once_all_are_gone()
    assert "the launcher is gone or cut off" in launch.said()

    again = Launch(bench, out)  # and DeepSpeed's launcher of one host, which it does not notice itself
    assert "ended before its ranks; the remaining ranks exit now" in again.said()
    again.kill(NODES[1], r"\S+/python -u -m deepspeed\.launcher\.launch")
    assert again.status_once_all_are_gone() == EXIT_STATUS_OF_LOST_PARENT, again.said()
    assert "rank 1 says: its launcher python (process " in again.said()
