"""Part 5: a checkpoint beside training, the state that it gives back, and whether steps from it repeat to the bit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_check_models import Built, build, join, model_config, random_pairs, random_unet, train
from gpu_check_report import Report, Setup, peak_gb

from ds_dpo.checkpoints.folder import Retention
from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.checkpoints.store import CheckpointStore
from ds_dpo.checkpoints.writer import CheckpointWriter, Contents
from ds_dpo.distributed.arithmetic import set_arithmetic
from ds_dpo.engine.engine import Engine
from ds_dpo.models.checksum import weights_checksum

IDENTITY = RunIdentity(world_size=1, stage=1, precision="as built", fingerprint="gpu_check")
# a third of SDXL's widths, 0.23 G parameters: 3.3 GB a checkpoint, because a disk writes 36 GB for too long
MEDIUM = {"block_out_channels": [96, 192, 384], "attention_head_dim": [3, 6, 12]}
RATE = ("--learning_rate", "1e-4", "--schedule.warmup_steps", "0")


def check(setup: Setup, report: Report) -> None:
    """Save while steps go on, load, and train the same steps twice, with any kernels and with deterministic ones."""
    # PyTorch reads cuBLAS's variable once, so it holds for both curves
    set_arithmetic(allow_tf32=False, deterministic=True, environ=os.environ)
    set_arithmetic(allow_tf32=False, deterministic=False, environ=os.environ)
    device, config = join(), model_config(setup, "unet") | (MEDIUM if setup.is_full else {})
    built = build(random_unet(config, setup, device=device), setup, device=device, stage=1, options=RATE)
    store = CheckpointStore(setup.folder, engine=built.engine, identity=IDENTITY, say=print)
    batches = [random_pairs(config, 1, device=device, seed=seed) for seed in range(10 if setup.is_full else 2)]
    train(built, batches[0])
    report.try_to("saved", lambda: _saved(setup, report, built, batches[0]))
    report.try_to("loaded", lambda: _loaded(report, store, built.engine))
    for name, deterministic in (("curve_of_any_kernels", False), ("curve_of_deterministic_kernels", True)):
        must = deterministic or device.type == "cpu"
        report.try_to(
            name, lambda only=deterministic, must=must: _curves(report, store, built, batches, only=only, must=must)
        )


def _saved(setup: Setup, report: Report, built: Built, batch: Any) -> dict[str, Any]:
    """Save in the background with steps meanwhile; leaves the checksum of what was saved in the report."""
    writer = CheckpointWriter(
        setup.folder, engine=built.engine, identity=IDENTITY, retention=Retention(newest=1), say=print
    )
    report.add(state_checksum=_checksum(built.engine))
    began = time.perf_counter()
    writer.begin(step=1, contents=Contents(client_state={"step": 1}), in_background=True)
    stalled, steps = time.perf_counter() - began, 0
    while writer.is_busy:
        train(built, batch)
        steps += 1
    saved = writer.finish()
    train(built, batch)
    report.require("training did not change the state", _checksum(built.engine) != report.results["state_checksum"])
    size = sum(path.stat().st_size for path in saved.folder.glob("*"))
    return {
        "gb": size / 1e9,
        "stall_seconds": stalled,
        "copy_gb_per_second": size / 1e9 / saved.copied_seconds if saved.copied_seconds else None,
        "written_seconds": saved.written_seconds,
        "steps_while_writing": steps,
    }


def _loaded(report: Report, store: CheckpointStore, engine: Engine) -> dict[str, Any]:
    """Load what was saved into the engine, which has trained on."""
    began = time.perf_counter()
    peak = peak_gb(store.load_newest)
    is_equal = _checksum(engine) == report.results["state_checksum"]
    report.require("the loaded state is not the saved one", is_equal)
    return {"seconds": time.perf_counter() - began, "peak_gb": peak, "is_bit_equal": is_equal}


def _curves(
    report: Report, store: CheckpointStore, built: Built, batches: list[Any], *, only: bool, must: bool
) -> dict[str, Any]:
    """Train the same steps from the checkpoint twice. only: by deterministic kernels. must: both must be equal."""
    set_arithmetic(allow_tf32=False, deterministic=only, environ=os.environ)
    curves = []
    for _ in range(2):
        store.load_newest()
        began = time.perf_counter()
        curves.append([float(train(built, batch)) for batch in batches])
        seconds = (time.perf_counter() - began) / len(batches)
    largest = max(abs(one - other) for one, other in zip(*curves, strict=True))
    is_equal = curves[0] == curves[1]
    report.require(f"two curves from one state differ by {largest}", is_equal or not must)
    return {"is_bit_equal": is_equal, "largest_difference": largest, "step_seconds": seconds, "losses": curves[0]}


def _checksum(engine: Engine) -> str:
    """Return the checksum of working weights, fp32 masters and moments."""
    return weights_checksum(_state(engine))


def _state(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    yield from engine.module.named_parameters()
    for number, master in enumerate(engine.flat_master_groups()):
        yield f"master {number}", master
    for number, state in enumerate(engine._raw.optimizer.optimizer.state.values()):
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                yield f"{name} {number}", value
