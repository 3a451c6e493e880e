"""The real clients of the trackers, without a network: `pip install wandb trackio` first; CI has neither.

An earlier start and its resumed one, which goes back to step 3, are one run at each service.
"""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ENVIRONMENT, ROOT

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from ds_dpo.run_folder.trackers import Picture, open_trackers
(tracker,) = open_trackers([sys.argv[1]], Path(sys.argv[2]), {"seed": 1})
tracker.continue_after(int(sys.argv[3]))
for step in range(int(sys.argv[3]) - 2, 7):
    tracker.scalars({"loss": 0.5 + step}, step=step)
tracker.images("samples", [Picture(pixels=np.zeros((8, 8, 3), np.uint8), caption="a circle")], step=6)
tracker.close()
"""


def id_of_two_starts(name: str, folder: Path) -> str:
    """Start, and start again after step 3. Returns the id under which the service knows the run."""
    environment = {**ENVIRONMENT, "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    for after in ("0", "3"):
        command = [sys.executable, "-c", PROGRAM, name, str(folder / "run"), after]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, "has failed" in done.stderr) == (0, False), done.stderr
    (run_id,) = json.loads((folder / "run" / "trackers.json").read_text()).values()
    return run_id


@pytest.mark.slow
def test_weights_and_biases_keeps_both_starts_as_one_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_id = id_of_two_starts("wandb", tmp_path)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    assert all(len(list(path.parent.glob("files/media/images/samples_6_*.png"))) == 1 for path in files)


@pytest.mark.slow
def test_trackio_gets_each_step_but_those_that_it_has(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    run_id = id_of_two_starts("trackio", tmp_path)
    rows = sqlite3.connect(tmp_path / "trackio" / "ds_dpo.db").execute("select run_name, step, metrics from metrics")
    found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert {name for name, _, _ in found} == {f"run-{run_id}"}
    losses = [(step, values["loss"]) for _, step, values in found if "loss" in values]
    assert sorted(losses) == sorted((step, 0.5 + step) for step in [*range(7), 4, 5, 6] if step > 0)
    assert [values["samples/0"]["caption"] for _, step, values in found if "samples/0" in values] == ["a circle"] * 2
