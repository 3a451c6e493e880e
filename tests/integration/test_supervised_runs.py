"""Real ranks under scripts/launch.py on this machine: a hang found, and a request that comes before training."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ENVIRONMENT, ROOT, free_port, metrics, spell

from ds_dpo.process.departure import EXIT_STATUS_OF_HANG

pytestmark = pytest.mark.launch
DEADLINE_SECONDS = 300
SETTINGS = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "pairs_per_step": 4,
    "micro_batch_pairs": 2,
    "max_train_steps": 1000,
    "cadence.save_every_steps": 1000,
    "cadence.sample_every_steps": "none",
    "supervision.hang_floor_seconds": 8,
}


def start(out, *, fault=""):
    """Start two ranks; what they say goes into a file beside the run."""
    out.parent.mkdir(exist_ok=True)
    command = [sys.executable, "scripts/launch.py", "--num_gpus", "2", "--master_port", str(free_port())]
    with out.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            [*command, "ds_dpo/train.py", *spell({**SETTINGS, "output_dir": out})],
            env={**ENVIRONMENT, "DS_DPO_FAULT": fault},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )


def said_by(out):
    return out.with_suffix(".txt").read_text()


def processes_of(out):
    """Ids of all processes that were started for a run."""
    named = f"--output_dir={out}".encode()
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and named in (place / "cmdline").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:
            continue  # it has just ended
    return found


def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(tmp_path):
    out = tmp_path / "hang"
    launcher = start(out, fault="step.begin@1#4=hang")
    assert launcher.wait(timeout=DEADLINE_SECONDS) == EXIT_STATUS_OF_HANG, said_by(out)
    assert processes_of(out) == []
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    stacks = {rank: (out / "stacks" / f"rank_{rank}.txt").read_text() for rank in (0, 1)}
    assert re.search(r"a micro-batch has taken more than \d+ s|another rank has found a hang", stacks[0])
    assert "fault_points.py" in stacks[1], "where rank 1 sleeps"
    assert "fault_points.py" not in stacks[0]
    assert "optimizer_step.py" in stacks[0], "where rank 0 waits for it"


def test_a_request_while_ranks_load_ends_them_before_training(tmp_path):
    out = tmp_path / "loading"
    launcher = start(out)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while "loading takes up to" not in said_by(out):
        assert time.monotonic() < deadline
        assert launcher.poll() is None, said_by(out)
        time.sleep(0.1)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(timeout=DEADLINE_SECONDS) == 0, said_by(out)
    assert processes_of(out) == []
    assert "stopped as asked before training began" in said_by(out)
    assert not (out / "checkpoints").exists() or not any((out / "checkpoints").glob("step_*"))
    assert not (out / "launch").exists()
