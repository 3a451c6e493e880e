"""Part 4: a reference in host memory: equal, pinned, not forked, and how fast its blocks come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from gpu_check_models import join, model_config, random_pairs, random_unet
from gpu_check_report import Report, Setup, timed

from ds_dpo.batch import PreferenceBatch
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.reference.block_offload import BlockOffload

SMALL_BLOCK_BYTES = 2**20  # so that the miniature has several


def check(setup: Setup, report: Report) -> None:
    """Compare 20 passes with a resident copy, measure both, and look at what forked processes hold."""
    device, config = join(), model_config(setup, "unet")
    unet = random_unet(config, setup, device=device)
    resident, moved = (
        FrozenCopy(unet, predict=predict_by_unet, dtype=setup.dtype, device=where) for where in (device, "cpu")
    )
    del unet
    limit = {} if setup.is_full else {"max_block_bytes": SMALL_BLOCK_BYTES}
    offload = BlockOffload(moved.module, device=device, **limit)
    total = sum(block.host.numel() for block in offload.blocks)
    pinned = [block.host.is_pinned() for block in offload.blocks] if device.type == "cuda" else []
    report.add(blocks=len(offload.blocks), host_gb=total / 1e9, pinned_blocks=sum(pinned))
    report.require("a block is not pinned", all(pinned))
    times = 20 if setup.is_full else 3
    report.try_to("passes", lambda: _passes(report, config, device, resident, moved, offload, times))
    report.try_to("seconds", lambda: _seconds(config, device, resident, moved, total))
    children = 8 if setup.is_full else 2
    report.try_to("forked", lambda: _forked(report, children, total))


def _passes(
    report: Report,
    config: dict[str, Any],
    device: torch.device,
    resident: FrozenCopy,
    moved: FrozenCopy,
    offload: BlockOffload,
    times: int,
) -> dict[str, Any]:
    """Return the largest difference over many passes, in which each next block comes while one computes."""
    largest = 0.0
    for number in range(times):
        batch = random_pairs(config, 1, device=device, seed=number)
        one, other = (_predict(reference, batch).float() for reference in (resident, moved))
        largest = max(largest, float((one - other).abs().max()))
    report.require(f"a pass differs by {largest}", largest == 0)
    return {"passes": times, "largest_difference": largest, "copies": offload.num_copies}


def _seconds(
    config: dict[str, Any], device: torch.device, resident: FrozenCopy, moved: FrozenCopy, total: int
) -> dict[str, float]:
    batch = random_pairs(config, 1, device=device)
    found = {}
    for name, reference in (("resident", resident), ("host", moved)):
        found[f"ms_{name}"] = 1000 * min(timed(lambda one=reference: _predict(one, batch)) for _ in range(2))
    found["gb_per_second_at_least"] = total / 1e9 / (found["ms_host"] / 1000)
    return found


def _predict(reference: FrozenCopy, batch: PreferenceBatch) -> torch.Tensor:
    return reference.predict(batch.latents, batch.image_timesteps(), batch.conditioning())


def _forked(report: Report, children: int, total: int) -> dict[str, float]:
    """Return the private memory of forked processes together, as the loader's are forked, in GB."""
    held = 0
    for _ in range(children):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            kilobytes = next(line.split()[1] for line in lines if line.startswith("Private_Dirty:"))
            os.write(writer, kilobytes.encode())
            os._exit(0)
        os.waitpid(child, 0)
        held += int(os.read(reader, 100)) * 1024
        os.close(reader)
        os.close(writer)
    report.require(f"{children} forked processes hold {held / 1e9:.2f} GB", held < max(total, 10**9))
    return {"children": children, "private_dirty_gb": held / 1e9}
