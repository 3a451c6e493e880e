"""Part 3: policy and reference predict exactly alike, and what a micro-batch takes of time and memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_check_models import SDPA, build, join, model_config, random_pairs, random_unet, train
from gpu_check_report import Report, Setup, peak_gb, timed

from ds_dpo.batch import PreferenceBatch
from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.attention import AttentionChoice, choose_attention

RESIDENCIES = ("replicated", "cpu", "zero3")
NEVER = 1_000_000  # micro-batches of a step: none of these steps ends, so no optimizer state is allocated


def check(setup: Setup, report: Report) -> None:
    """Compare and measure at each ZeRO stage. Stage 3 is last, because it changes torch for the rest of a process."""
    device = join()
    numbers = (1, 2, 4, 8) if setup.is_full else (2,)
    report.try_to("channels_last", lambda: _channels_last(setup, device))
    _release()
    report.try_to("xformers", lambda: _xformers(setup, report, device, numbers))
    for stage, micro_batches in ((1, numbers), (2, numbers[:1]), (3, numbers[:1])):
        _release()
        report.try_to(
            f"zero{stage}", lambda stage=stage, numbers=micro_batches: _stage(setup, report, device, stage, numbers)
        )


def _stage(
    setup: Setup,
    report: Report,
    device: torch.device,
    stage: int,
    micro_batches: tuple[int, ...],
    attention: AttentionChoice = SDPA,
) -> dict[str, Any]:
    config = model_config(setup, "unet")
    unet = random_unet(config, setup, device=device, attention=attention)
    built = build(unet, setup, device=device, stage=stage, residencies=RESIDENCIES, accumulation=NEVER)
    batch = random_pairs(config, 1, device=device)
    differences = {name: step.largest_difference(batch) for name, step in built.steps.items()}
    for name, difference in differences.items():
        report.require(f"ZeRO-{stage}, {name}, {attention.name}: the difference is {difference}", difference == 0)
    error = float(built.steps["replicated"].policy_errors(batch)[0].mean())
    report.require(f"ZeRO-{stage}: the policy's error is {error}", 0 < error < float("inf"))
    found: dict[str, Any] = {"largest_difference": differences, "policy_error": error}
    for number in micro_batches:
        pairs = random_pairs(config, number, device=device)
        found[f"micro_batch_{number}"] = _measured(lambda pairs=pairs: train(built, pairs))
    if stage == 1 and attention is SDPA:
        report.try_to("profile", lambda: _profiled(lambda: train(built, batch)))
        report.try_to("throughput_timer", lambda: _with_timer(built.engine._raw, lambda: train(built, batch)))
    built.engine._raw.destroy()
    return found


def _measured(work: Callable[[], Any]) -> dict[str, float | None]:
    """Return the median milliseconds and the peak GB of some work, on a GPU after it was done once."""
    if not torch.cuda.is_initialized():
        return {"ms": 1000 * timed(work), "peak_gb": None}
    peak = peak_gb(work)
    return {"ms": 1000 * statistics.median(timed(work) for _ in range(3)), "peak_gb": peak}


def _profiled(work: Callable[[], Any]) -> dict[str, float]:
    """Return the number of kernels of a micro-batch, and in what share of it the GPU computes; on a CPU operations."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    is_cuda = torch.cuda.is_initialized()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        seconds = timed(work)
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind]
    if not is_cuda:
        return {"operations": len(events)}
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e6
    return {"kernels": len(events), "gpu_busy_share": busy / seconds}


def _with_timer(raw: Any, work: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds of a micro-batch without and with DeepSpeed's throughput timer, which waits twice."""
    timer = raw.tput_timer
    without = _measured(work)["ms"]
    timer.config.enabled, timer.start_step = True, 0
    try:
        with_timer = _measured(work)["ms"]
    finally:
        timer.config.enabled = False
    return {"ms_without": without or 0.0, "ms_with": with_timer or 0.0}


def _xformers(setup: Setup, report: Report, device: torch.device, numbers: tuple[int, ...]) -> dict[str, Any]:
    probe = random_unet(model_config(setup, "unet"), setup, device=torch.device("meta"))
    try:
        choice = choose_attention(probe, "xformers", device=device, dtype=setup.dtype)
    except ModelError as error:
        return {"skipped": str(error)[:300]}
    return _stage(setup, report, device, 1, numbers[:1], choice)


@torch.no_grad()
def _channels_last(setup: Setup, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of a forward pass of one pair, row-major as the product does, and with channels last."""
    from diffusers import UNet2DConditionModel

    config = model_config(setup, "unet")
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(config).eval()
    unet = unet.to(setup.dtype)
    batch: PreferenceBatch = random_pairs(config, 1, device=device)
    given, timesteps = batch.conditioning(), batch.image_timesteps()
    others = {"text_embeds": given.pooled.to(setup.dtype), "time_ids": given.extras["time_ids"]}
    found = {}
    for name, layout in (("row_major", torch.contiguous_format), ("channels_last", torch.channels_last)):
        unet.to(memory_format=layout)
        latents = batch.latents.to(setup.dtype).contiguous(memory_format=layout)
        forward = partial(unet, latents, timesteps, given.text_states.to(setup.dtype), added_cond_kwargs=others)
        found[f"ms_{name}"] = _measured(forward)["ms"] or 0.0
    return found


def _release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
