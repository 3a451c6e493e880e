"""Programs answer --help, a dry run and a refused configuration before anything heavy is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

HEAVY = {"torch", "deepspeed", "diffusers", "transformers", "datasets"}
TRAIN = "ds_dpo/train.py"
PROGRAMS = [TRAIN, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.py"))]
RUN = """
import contextlib, io, json, runpy, sys
sys.argv = sys.argv[1:]
shown, status = io.StringIO(), 0
try:
    with contextlib.redirect_stdout(shown):
        runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code
print(json.dumps([status or 0, shown.getvalue(), sorted(sys.modules)]))
"""


def run(*command: str) -> tuple[int, str, set[str]]:
    """Run a program by its path; return its status, what it shows, and the modules that it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    status, shown, modules = json.loads(done.stdout)
    return status, shown, set(modules)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_heavy(program: str) -> None:
    status, shown, modules = run(program, "--help")
    assert status == 0
    assert len(shown.splitlines()) > 3
    assert modules & HEAVY == set()


def test_a_dry_run_imports_nothing_heavy() -> None:
    status, shown, modules = run(TRAIN, "--dry_run", "--world_size", "16")
    assert status == 0
    assert "= 16 ranks x" in shown
    assert modules & HEAVY == set()


def test_a_mistyped_option_is_refused_before_anything_heavy_is_imported() -> None:
    status, shown, modules = run(TRAIN, "--dry_run", "--learning_rat", "1e-5")
    assert (status, shown) == (2, "")
    assert modules & HEAVY == set()


def test_under_plain_srun_one_rank_says_what_all_ranks_refuse() -> None:
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1"}
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environ = {name: value for name, value in os.environ.items() if name not in launched} | srun
    said = {
        rank: subprocess.run(
            [sys.executable, TRAIN, "--config", "miniature", "--expected_world_size", "3"],
            cwd=ROOT,
            env={**environ, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            capture_output=True,
            text=True,
            timeout=120,
        )
        for rank in ("0", "1")
    }
    assert {rank: done.returncode for rank, done in said.items()} == {"0": 2, "1": 2}
    assert "error: expected_world_size is 3" in said["0"].stderr
    assert said["1"].stderr == ""


BEFORE = """
import runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "deepspeed", "diffusers", "transformers", "datasets"}:
            print("IMPORTS", name, flush=True)
            raise SystemExit(7)
sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("rank", "said"), [(None, True), ("0", True), ("1", False)])
def test_a_start_says_what_it_loads_before_torch_is_imported(tmp_path: Path, rank: str | None, said: bool) -> None:
    """The order of lines and imports, not the time: imports of torch and DeepSpeed take 10 s and more."""
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environ = {name: value for name, value in os.environ.items() if name not in launched}
    if rank is not None:
        environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    run = tmp_path / "run"
    command = [sys.executable, "-c", BEFORE, TRAIN, "--config=miniature", f"--output_dir={run}"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (7, "")
    ranks = "1 rank" if rank is None else "2 ranks"
    first = [f"starting run {run} on {ranks}: importing PyTorch"] if said else []
    assert done.stdout.splitlines() == [*first, "IMPORTS torch"]
    assert not run.exists()
