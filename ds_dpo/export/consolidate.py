"""From a run's ZeRO shards to a folder that diffusers loads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from ds_dpo.config import resolve_asset
from ds_dpo.errors import ConfigError
from ds_dpo.export.destination import check_replaceable, new_folder
from ds_dpo.export.pipeline import copy_files, list_copies, locate_pipeline, locate_vae
from ds_dpo.export.source import BaseModel, Source, choose_base, find_source, unet_config
from ds_dpo.export.unet import DTYPES, write_unet
from ds_dpo.zero_shards.reader import ZeroCheckpoint, open_checkpoint

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to export: source is a run, a checkpoint or a DeepSpeed save_dir; base and vae override the run's own."""

    source: Path
    out: Path
    step: int | None = None
    dtype: str = "fp16"
    format: str = "unet"
    base: str | None = None
    vae: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Files to copy beside the UNet, and the lines that load the result."""

    copies: list[tuple[Path, str]]
    usage: str


def consolidate(request: Request, *, say: Say = print) -> None:
    """Export a checkpoint as asked, saying what is done; request.out is complete afterwards or untouched.

    Raises CheckpointError, ModelError or ConfigError naming what cannot be read, checked, found or written.
    """
    if request.vae is not None and request.format != "pipeline":
        raise ConfigError(f"--vae {request.vae}: only a pipeline has a VAE; add --format pipeline")
    started = time.perf_counter()
    check_replaceable(request.out)
    source = find_source(request.source, step=request.step, say=say)
    checkpoint = open_checkpoint(source.folder)
    say(describe(source, checkpoint))
    base = choose_base(source, request.base)
    config = unet_config(source, base)
    plan = FORMATS[request.format](request, base)
    dtype = DTYPES[request.dtype]
    weights_bytes = dtype.itemsize * sum(placement.numel for placement in checkpoint.parameters.values())
    copied_bytes = sum(path.stat().st_size for path, _ in plan.copies)
    with new_folder(request.out, needed_bytes=weights_bytes + copied_bytes, record=_record(request, checkpoint)) as out:
        copy_files(plan.copies, out)
        written = write_unet(checkpoint, config, out / "unet", dtype=dtype)
    seconds = time.perf_counter() - started
    say(f"wrote {written.num_tensors} tensors, {written.num_bytes / 1e9:.3f} GB in {request.dtype}, {seconds:.1f} s")
    if plan.copies:
        say(f"copied {len(plan.copies)} files of {base.name if base else ''}, {copied_bytes / 1e9:.3f} GB")
    say(f"saved to {request.out}")
    say(f"use: {plan.usage}")


def describe(source: Source, checkpoint: ZeroCheckpoint) -> str:
    """One line on the checkpoint that was chosen."""
    numel = sum(placement.numel for placement in checkpoint.parameters.values())
    checked = "manifest verified" if source.is_verified else "no manifest to verify"
    return (
        f"reading {source.folder}: step {checkpoint.global_steps}, ZeRO stage {checkpoint.stage}, "
        f"{checkpoint.world_size} ranks, {numel:,} parameters, {checked}"
    )


def _plan_unet(request: Request, base: BaseModel | None) -> Plan:
    torch_dtype = _torch_name(request)
    usage = f'UNet2DConditionModel.from_pretrained("{request.out}", subfolder="unet", torch_dtype={torch_dtype})'
    return Plan([], usage)


def _plan_pipeline(request: Request, base: BaseModel | None) -> Plan:
    if base is None:
        raise ConfigError(f"--format pipeline: {request.source} does not name its base pipeline; add --base MODEL")
    pipeline = locate_pipeline(base)
    vae = request.vae or base.vae  # the run's own VAE made the latents that it was trained on
    copies = list_copies(pipeline, variant=base.variant, vae=locate_vae(resolve_asset(vae)) if vae else None)
    return Plan(copies, f'DiffusionPipeline.from_pretrained("{request.out}", torch_dtype={_torch_name(request)})')


FORMATS: dict[str, Callable[[Request, BaseModel | None], Plan]] = {"unet": _plan_unet, "pipeline": _plan_pipeline}


def _torch_name(request: Request) -> str:
    return str(DTYPES[request.dtype])


def _record(request: Request, checkpoint: ZeroCheckpoint) -> dict[str, object]:
    return {
        "format": request.format,
        "dtype": request.dtype,
        "checkpoint": checkpoint.folder.name,
        "step": checkpoint.global_steps,
        "stage": checkpoint.stage,
        "world_size": checkpoint.world_size,
    }
