"""Programs answer --help, and a dry run, before anything heavy is imported."""

import json
import subprocess
import sys

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
