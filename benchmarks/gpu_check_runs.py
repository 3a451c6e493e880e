"""Part 1: the product trains the miniature with each kind of DeepSpeed settings, and ends well."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check_report import Report, Setup

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ROOT / "tests" / "baselines" / "miniature_fp32.jsonl"
# the run whose curve in fp32, on a CPU, is committed
COMMON: dict[str, object] = {
    "config": "miniature",
    "max_train_steps": 20,
    "batch.pairs_per_step": 4,
    "batch.micro_batch_pairs": 4,
    "data.max_rows": 100,
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 40,
    "cadence.save_every_steps": 20,
    "cadence.sample_every_steps": "none",
}
# bf16 differs from fp32 by up to 0.06 in a step's loss on a CPU; other pairs or noise would differ by 1
LARGEST_LOSS_DIFFERENCE = {"zero2_bf16": 0.3, "zero2_fp32_cpu": 1e-4}
LN_2_ROUNDING = 1e-6
FULL = ("zero1_bf16", "zero2_fp16", "zero3_bf16", "zero3_fp16", "zero3_offload")
TINY = ("zero3_fp32_cpu",)


def check(setup: Setup, report: Report) -> None:
    """Train by a launch of its own, then by one start after another in this process."""
    file, steps = ("zero2_bf16", 20) if setup.is_full else ("zero2_fp32_cpu", 3)
    report.try_to(file, lambda: _launched(setup, report, file, steps))
    names = FULL if setup.is_full else TINY
    for name in names:
        report.try_to(name, lambda name=name: _trained(setup, report, name))
    if not setup.has_gpu:
        for name in ("zero2_fp16", "zero3_fp16"):
            report.skip(name, "fp16 needs a GPU")


def _launched(setup: Setup, report: Report, file: str, steps: int) -> dict[str, Any]:
    """Start train.py as a user does; returns its losses, their distance from the CPU's, and how it ended."""
    run = setup.folder / "launched"
    options = {**COMMON, "deepspeed_config": file, "max_train_steps": steps, "output_dir": run}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "ds_dpo" / "train.py"), *spelled(options)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    report.require(f"train.py ended with status {done.returncode}", done.returncode == 0)
    losses, expected = curve(run), json.loads(BASELINES.read_text(encoding="utf-8").partition("\n")[0])["loss"]
    difference = max((abs(one - other) for one, other in zip(losses, expected, strict=False)), default=math.nan)
    report.require("the first loss is not ln 2", bool(losses) and abs(losses[0] - math.log(2)) < LN_2_ROUNDING)
    report.require("the curve is not that of a CPU", difference < LARGEST_LOSS_DIFFERENCE[file])
    log = (run / "log.txt").read_text(encoding="utf-8") if (run / "log.txt").is_file() else ""
    return {
        "status": done.returncode,
        "steps": len(losses),
        "preflight_difference": 0 if "(largest difference 0)" in log else "not 0, see log",
        "largest_loss_difference_from_cpu": difference,
        "launch_seconds": time.perf_counter() - began,
        "seconds_after_last_line": time.time() - (run / "log.txt").stat().st_mtime if log else None,
        "device": [line.partition("device: ")[2] for line in log.splitlines() if "device: " in line][:1],
        "standard_error": done.stderr.strip().splitlines()[-5:],
    }


def _trained(setup: Setup, report: Report, name: str) -> dict[str, Any]:
    """Train a few steps in this process, which is much faster than to launch."""
    from ds_dpo import train

    steps = 5 if setup.is_full else 2
    run = setup.folder / name
    began = time.perf_counter()
    train.main(spelled({**COMMON, "deepspeed_config": name, "max_train_steps": steps, "output_dir": run}))
    losses = curve(run)
    report.require(f"{name}: the first loss is not ln 2", abs(losses[0] - math.log(2)) < LN_2_ROUNDING)
    report.require(f"{name} did not train {steps} steps to finite losses", _is_finite(losses, steps))
    return {"losses": losses, "seconds": time.perf_counter() - began}


def _is_finite(losses: list[float], steps: int) -> bool:
    return len(losses) == steps and all(map(math.isfinite, losses))


def spelled(options: dict[str, Any]) -> list[str]:
    """Return options as arguments of train.py."""
    return [f"--{name}={value}" for name, value in options.items()]


def curve(run: Path, name: str = "loss") -> list[float]:
    """Return a metric of each step of a run."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line)[name] for line in lines]
