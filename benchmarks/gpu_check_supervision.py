"""Part 7: a long step of short micro-batches is no hang, and a start without a GPU of its own says so."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from gpu_check_report import Report, Setup
from gpu_check_runs import COMMON, ROOT, curve, spelled

from ds_dpo.distributed.device import gpu_index
from ds_dpo.supervision.hang_watch import HangWatch, MicroBatchTimes

EXIT_STATUS_OF_REFUSAL = 2


def check(setup: Setup, report: Report) -> None:
    """Train one long step in this process, then start the product where it should refuse, and on the only GPU."""
    report.try_to("long_step", lambda: _long_step(setup, report))
    report.try_to("watch", lambda: _simulated(report))
    report.try_to("no_gpu", lambda: _without_gpu(setup, report))
    index = gpu_index(1, 1, {})
    report.add(index_of_the_only_gpu=index)
    report.require(f"a rank whose scheduler shows it one GPU takes number {index}", index == 0)
    if setup.has_gpu:
        report.try_to("local_rank_1", lambda: _on_the_only_gpu(setup, report))
    else:
        report.skip("local_rank_1", "needs a GPU")


def _long_step(setup: Setup, report: Report) -> dict[str, Any]:
    """Train a step of many micro-batches, each of which must count; a hang would end this part with status 70.

    At full scale the step takes more than 3 floors. Before micro-batches counted, that ended runs.
    """
    from ds_dpo import train

    run, beats = setup.folder / "long_step", []
    file, micro_batches, floor = ("zero1_bf16", 512, 5.0) if setup.is_full else ("zero1_fp32_cpu", 4, 600.0)
    options = {
        **COMMON,
        "deepspeed_config": file,
        "max_train_steps": 1,
        "batch.pairs_per_step": micro_batches,
        "batch.micro_batch_pairs": 1,
        "data.max_rows": "none",
        "supervision.hang_floor_seconds": floor,
        "output_dir": run,
    }
    beat = HangWatch.beat
    HangWatch.beat = lambda watch: (beats.append(1), beat(watch))[1]  # type: ignore[method-assign]
    try:
        train.main(spelled(options))
    finally:
        HangWatch.beat = beat  # type: ignore[method-assign]
    report.require(f"{len(beats)} of {micro_batches} micro-batches counted", len(beats) == micro_batches)
    (seconds,) = curve(run, "step_seconds")
    return {
        "micro_batches": len(beats),
        "floor_seconds": floor,
        "step_seconds": seconds,
        "is_longer_than_3_floors": seconds > 3 * floor,
    }


def _simulated(report: Report) -> dict[str, Any]:
    """Drive a watch by hand: a step of 64 micro-batches of 2 floors each is no hang, and one of 4 floors is."""
    watch = HangWatch(
        MicroBatchTimes(factor=10, floor_seconds=5), long_work_seconds=60, ends_seized=False, on_hang=print
    )
    for _ in range(64):
        watch.look(10)
        report.require("a micro-batch of 2 floors is a hang", watch.reason is None)
        watch.beat()
    watch.look(20)
    report.require("a micro-batch of 4 floors is no hang", watch.reason is not None)
    return {"seconds_without_a_hang": 64 * 10, "reason": watch.reason}


def _without_gpu(setup: Setup, report: Report) -> dict[str, Any]:
    """Start the product without a GPU and without asking for the CPU."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    hidden.pop("DS_ACCELERATOR", None)
    done = _train(setup, "no_gpu", hidden)
    said = [line for line in done.stderr.splitlines() if "no GPU works here" in line]
    report.require("a start without a GPU does not say so", bool(said))
    report.require(f"a start without a GPU ended with {done.returncode}", done.returncode == EXIT_STATUS_OF_REFUSAL)
    report.require("a refused start left a run", not (setup.folder / "no_gpu" / "metrics.jsonl").exists())
    return {"status": done.returncode, "said": said[:1]}


def _on_the_only_gpu(setup: Setup, report: Report) -> dict[str, Any]:
    """Start a rank whose number on its host is 1 where it sees one GPU, as under srun --gpus-per-task."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29517"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = _train(setup, "local_rank_1", {**os.environ, **rank, "CUDA_VISIBLE_DEVICES": visible})
    report.require(f"rank 1 of a host on its only GPU ended with {done.returncode}", done.returncode == 0)
    return {"status": done.returncode, "last_lines": done.stderr.strip().splitlines()[-3:]}


def _train(setup: Setup, name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    options = {**COMMON, "max_train_steps": 1, "output_dir": setup.folder / name}
    return subprocess.run(
        [sys.executable, str(ROOT / "ds_dpo" / "train.py"), *spelled(options)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
    )
