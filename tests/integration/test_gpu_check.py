"""The program for the first GPU does real work on a CPU: all parts at small sizes, with values, limits and statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


def run(*options: object) -> tuple[int, list[dict[str, Any]], str]:
    """Run the program; returns its status, its lines, and standard error."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *map(str, options)]
    done = subprocess.run(command, env={**os.environ, **CPU}, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """All parts, done once, by number; each has passed."""
    out = tmp_path_factory.mktemp("gpu_check") / "lines.jsonl"
    status, lines, errors = run("--scale", "tiny", "--out", out)
    *parts, last = lines
    assert [line["failures"] for line in parts] == [[]] * 8, errors
    assert (last["passed"], last["failed"], last["timed out"]) == ([*range(1, 9)], [], [])
    assert status == 0, errors
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    return {line["part"]: line["results"] for line in parts}


@pytest.mark.slow
@pytest.mark.launch
def test_every_part_measures_something_on_a_cpu(parts: dict[int, dict[str, Any]]) -> None:
    skipped = {
        number: [name for name, value in found.items() if "skipped" in str(value)] for number, found in parts.items()
    }
    assert skipped == {
        1: ["zero2_fp16", "zero3_fp16"],
        2: [],
        3: ["xformers"],
        4: [],
        5: [],
        6: ["bitsandbytes"],
        7: ["local_rank_1"],
        8: ["vae_fp16"],
    }
    launched = parts[1]["zero2_fp32_cpu"]
    assert (launched["status"], launched["steps"], launched["preflight_difference"]) == (0, 3, 0)
    assert launched["largest_loss_difference_from_cpu"] < 1e-4, "the committed curve"
    assert launched["device"] == ["cpu (DS_ACCELERATOR=cpu)"]
    assert parts[1]["zero3_fp32_cpu"]["losses"][0] == pytest.approx(0.693147, abs=1e-6)
    # 3 prompts, 2 seeds, before and after the step, beside the comparison pages
    assert parts[2]["drawn"]["images"] >= 6
    for stage in ("zero1", "zero2", "zero3"):
        assert parts[3][stage]["largest_difference"] == {"replicated": 0, "cpu": 0, "zero3": 0}
        assert parts[3][stage]["policy_error"] > 0
        assert parts[3][stage]["micro_batch_2"]["ms"] > 0
    assert parts[3]["profile"]["operations"] > 1000
    assert (parts[4]["passes"]["passes"], parts[4]["passes"]["largest_difference"]) == (3, 0)
    assert parts[4]["passes"]["copies"] >= 3 * parts[4]["blocks"] > 2
    assert parts[4]["forked"]["private_dirty_gb"] < 1
    assert parts[5]["loaded"]["is_bit_equal"] is True
    assert parts[5]["saved"]["gb"] > 0.02, "14 bytes for each of 2.3 million parameters"
    for kernels in ("any", "deterministic"):
        found = parts[5][f"curve_of_{kernels}_kernels"]
        assert (found["is_bit_equal"], found["largest_difference"]) == (True, 0)
        assert found["losses"][0] != found["losses"][1]
    assert 0 <= parts[6]["largest_difference"] < 1e-6
    assert parts[7]["long_step"]["micro_batches"] == 4
    assert parts[7]["watch"] == {
        "seconds_without_a_hang": 640,
        "reason": "a micro-batch has taken more than 15 s",
    }
    assert parts[7]["no_gpu"]["status"] == 2
    assert "no GPU works here" in parts[7]["no_gpu"]["said"][0]
    assert parts[7]["index_of_the_only_gpu"] == 0
    assert parts[8]["group_timeouts_seconds"] == [77 * 60, 77 * 60]
    assert parts[8]["attention"]["auto"].startswith("attention: sdpa")
    assert parts[8]["vae_fp32"]["latents"] == [2, 4, 8, 8]
    assert parts[8]["vae_fp32"]["images"] == [1, 3, 32, 32]


def test_a_part_that_exceeds_its_limit_is_named_and_the_status_is_not_0() -> None:
    status, (part, last), errors = run("--scale", "tiny", "--parts", "6", "--limit", "0.02")
    assert status == 1, errors
    assert (part["part"], part["status"], part["limit_seconds"]) == (6, "timed out", 0.02)
    assert part["failures"] == ["it was killed at its limit of 0.02 s"]
    assert (last["passed"], last["failed"], last["timed out"]) == ([], [], [6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "full"], "--scale full needs a GPU, and DS_ACCELERATOR=cpu is set; give --scale tiny"),
        (["--scale", "tiny", "--parts", "3,9"], "there is no part 9; the parts are 1 to 8"),
    ],
)
def test_what_cannot_be_done_is_refused(options: list[str], message: str) -> None:
    status, lines, errors = run(*options)
    assert (status, lines) == (2, [])
    assert message in errors


def test_a_killed_part_keeps_its_results_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import gpu_check

    def check(setup: Any, report: Any) -> None:
        child = subprocess.Popen(["sleep", "600"])
        report.add(child=child.pid, ratio=0.123456789, nothing=float("nan"))
        report.require("two is one", 2 == 1)
        report.try_to("division", lambda: 1 / 0)
        child.wait()

    monkeypatch.setitem(sys.modules, "a_part", SimpleNamespace(check=check))
    monkeypatch.setitem(gpu_check.PARTS, 1, gpu_check.Part(name="of a test", module="a_part", limit_seconds=1))
    line = gpu_check._do(1, "full", tmp_path / "1", limit=None)
    child = line["results"].pop("child")
    assert line["status"] == "timed out"
    assert line["results"] == {
        "ratio": 0.123457,
        "nothing": "nan",
        "division": {"error": "ZeroDivisionError: division by zero"},
    }
    assert line["failures"] == [
        "two is one",
        "division raised ZeroDivisionError",
        "it was killed at its limit of 1 s",
    ]
    assert is_gone(child)


def is_gone(process: int) -> bool:
    """Whether a process has ended; init may need a moment to take note of it."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
    return False
