"""Ten starts of two runs in one folder: one trains, the others say who holds it; after a kill the next one goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launching import ENVIRONMENT, ROOT, curve, free_port, spell

pytestmark = [pytest.mark.launch, pytest.mark.slow]
SETTINGS = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "pairs_per_step": 4,
    "micro_batch_pairs": 2,
    "schedule.warmup_steps": 0,
    "schedule.decay_steps": 20,
    "cadence.save_every_steps": 1,
    "cadence.sample_every_steps": "none",
}
FOREVER = 1_000_000
BIN = Path(sys.executable).parent
PROGRAM = str(ROOT / "ds_dpo" / "train.py")


def starts():
    """Return the command of each kind of start. torchrun ends with its own status 1 whatever a rank says."""
    port = str(free_port())
    return {
        "python": [sys.executable, PROGRAM],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port, PROGRAM],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port, PROGRAM],
        "launch": [sys.executable, str(ROOT / "scripts" / "launch.py"), "--num_gpus", "2", PROGRAM],
    }


def start(kind, run, *, steps, seed=0):
    options = spell({**SETTINGS, "output_dir": run, "max_train_steps": steps, "seed": seed})
    return subprocess.Popen(
        [*starts()[kind], *options], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_one_start_trains_and_the_others_say_who_does(tmp_path):
    run = tmp_path / "run"
    holder = start("python", run, steps=FOREVER)
    assert any("saved" in line for line in holder.stdout), "it trains until it is killed"
    threading.Thread(target=holder.stdout.read, daemon=True).start()  # a full pipe would stop it
    since = json.loads((run / "run.lock").read_text().splitlines()[1])["since"]
    for kind, seed in [(kind, seed) for seed in (0, 1) for kind in starts()]:
        said, _ = (other := start(kind, run, steps=FOREVER, seed=seed)).communicate(timeout=120)
        assert other.returncode == (1 if kind == "torchrun" else 2), said
        assert f"is in use by another start, on {os.uname().nodename}, process {holder.pid}, since {since}" in said, (
            kind
        )
    assert holder.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    reached = len(curve(run))
    following = start("launch", run, steps=reached + 2)
    said, _ = following.communicate(timeout=180)
    assert following.returncode == 0, said
    assert "resumed from step" in said
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == list(
        range(1, reached + 3)
    )
    assert not list((run / "checkpoints").glob("*.damaged*"))
    assert not list(run.glob("run.lock*"))
