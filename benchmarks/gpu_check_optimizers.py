"""Part 6: the update on the host, fused against plain, and bitsandbytes beyond 2^31 elements on a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_check_report import Report, Setup, timed

from ds_dpo.config.load import load_config
from ds_dpo.engine.optimizers import LARGEST_INT32, build_optimizer
from ds_dpo.process.host_memory import available_bytes

MANY = 2_567_463_684 // 4  # a quarter of SDXL's: filling all of them takes longer than updates
BYTES_OF_ELEMENT = 4 * 6  # weight, gradient, two moments, and what a plain update writes in between
FEW = 10_000_000


def check(setup: Setup, report: Report) -> None:
    """Compare both updates on few elements, and time them on a quarter of those that SDXL has."""
    few = FEW if setup.is_full else 100_000
    report.try_to("largest_difference", lambda: _difference(report, few))
    many = min(MANY, int(0.8 * (available_bytes() or 0)) // BYTES_OF_ELEMENT) if setup.is_full else few
    report.add(elements=many, threads=torch.get_num_threads())
    for is_fused in (True, False):
        name = "fused_seconds" if is_fused else "plain_seconds"
        report.try_to(name, lambda is_fused=is_fused: _seconds(many, is_fused=is_fused))
    if setup.is_full and setup.has_gpu:
        report.try_to("bitsandbytes", _bitsandbytes)
    else:
        report.skip("bitsandbytes", "needs a GPU")


def _optimizer(weights: torch.nn.Parameter, *, is_fused: bool) -> torch.optim.Optimizer:
    config = load_config(["--config", "miniature"]).config.optimizer
    optimizer = build_optimizer([weights], config)
    assert optimizer.defaults["fused"], "the product's is fused"
    if is_fused:
        return optimizer
    options = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    return torch.optim.AdamW([weights], fused=False, foreach=False, **options)


def _weights(number: int) -> torch.nn.Parameter:
    """Return weights with gradients, both repeated from a random block: drawing billions takes longer than updates."""
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    weights = torch.nn.Parameter(torch.empty(number))
    weights.grad = torch.empty(number)
    with torch.no_grad():
        for start in range(0, number, len(block)):
            part = block[: number - start]
            weights[start : start + len(block)] = part
            weights.grad[start : start + len(block)] = part.flip(0)
    return weights


def _difference(report: Report, number: int, *, updates: int = 5) -> float:
    found = []
    for is_fused in (True, False):
        weights = _weights(number)
        optimizer = _optimizer(weights, is_fused=is_fused)
        for _ in range(updates):
            optimizer.step()
        found.append(weights.detach())
    largest = float((found[0] - found[1]).abs().max())
    report.require(f"fused and plain updates differ by {largest}", largest < 1e-6)
    return largest


def _seconds(number: int, *, is_fused: bool) -> float:
    """Return the seconds of the second update; the first one allocates the moments."""
    optimizer = _optimizer(_weights(number), is_fused=is_fused)
    optimizer.step()
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


def _bitsandbytes() -> dict[str, Any]:
    """Update more elements than 32 bits count, which the product refuses; says what happens if one does."""
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        return {"skipped": f"bitsandbytes: {error}"[:300]}
    found = {}
    for name, number in (("below", 10_000_000), ("above", LARGEST_INT32 + 50_000_000)):
        weights = torch.nn.Parameter(torch.ones(number, device="cuda"))
        weights.grad = torch.ones(number, device="cuda")
        optimizer = bitsandbytes.optim.AdamW8bit([weights], lr=0.1)
        try:
            seconds = timed(optimizer.step)
            changed = int((weights.detach() != 1).sum()) / number
            found[name] = {"elements": number, "seconds": seconds, "changed_share": changed}
        except RuntimeError as error:
            found[name] = {"elements": number, "error": str(error)[:200]}
        del weights, optimizer
    return found
