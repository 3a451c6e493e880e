"""Part 2: a run that reads a cache draws its images, which needs encoders that no pair moved to the device."""

from __future__ import annotations

from typing import Any

from gpu_check_report import Report, Setup
from gpu_check_runs import COMMON, curve, spelled


def check(setup: Setup, report: Report) -> None:
    """Make a cache, and train from it with validation images before and after the only step."""
    cache = setup.folder / "cache"
    file = "zero2_bf16" if setup.is_full else "zero2_fp32_cpu"
    options = {**COMMON, "data.max_rows": 16, "max_train_steps": 1, "deepspeed_config": file}
    report.try_to("cache_bytes", lambda: _cached(cache, options))
    report.try_to("drawn", lambda: _drawn(setup, report, {**options, "data.cache": cache}))


def _cached(cache: Any, options: dict[str, Any]) -> int:
    from ds_dpo.commands.cache import main

    main([*spelled(options), f"--out={cache}", "--dtype=fp32"])
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def _drawn(setup: Setup, report: Report, options: dict[str, Any]) -> dict[str, Any]:
    from ds_dpo import train

    run = setup.folder / "run"
    drawing = {"cadence.sample_every_steps": 1, "held_out.every_steps": "none", "validation.num_inference_steps": 2}
    train.main(spelled({**options, **drawing, "output_dir": run}))
    images = sorted(path.name for path in (run / "samples").rglob("*.png"))
    report.require("no image was drawn", bool(images))
    return {"images": len(images), "losses": curve(run)}
