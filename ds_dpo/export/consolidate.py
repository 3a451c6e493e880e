"""Export a checkpoint: from a run's ZeRO shards to a model that other programs load, verified first."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path

from ds_dpo.errors import CheckpointError, ConfigError
from ds_dpo.export.base_weights import required_weights, weights_at_hand
from ds_dpo.export.card.card import CardFacts, facts_of_run, write_card
from ds_dpo.export.card.publish import push_folder
from ds_dpo.export.destination import check_replaceable, check_room, new_file, new_folder
from ds_dpo.export.formats import FORMATS, Job, Plan, Written
from ds_dpo.export.lora.adapter import find_adapter, merge_adapter
from ds_dpo.export.pipeline import check_complete, copy_files, state_scheduler
from ds_dpo.export.request import Request, check_options, is_one_file
from ds_dpo.export.source import Source, choose_base, denoiser_config, find_source
from ds_dpo.export.tensors.frozen import restore_frozen
from ds_dpo.export.tensors.tables import with_tables
from ds_dpo.export.tensors.verification import Distance, measure_distance, verify_files
from ds_dpo.export.tensors.weights import Weights, averaged, select_keys
from ds_dpo.models.families.table import family_of
from ds_dpo.process.say import Say
from ds_dpo.zero_shards.reader import ZeroCheckpoint, open_checkpoint


def consolidate(request: Request, *, say: Say = print) -> None:
    """Export a checkpoint as requested. Afterwards request.out is complete, or it was not touched.

    Raises CheckpointError, ModelError or ConfigError that names what cannot be read, verified, found or written.
    """
    check_options(request)
    started = time.perf_counter()
    check_replaceable(request.out)
    source = find_source(request.source, step=request.step, say=say)
    checkpoint = open_checkpoint(source.folder, verify=not source.is_verified)
    say(describe(source, checkpoint))
    job = look_into(request, source, checkpoint, say=say)
    plan = FORMATS[request.format](job)
    check_room(request.out, needed_bytes=plan.needed_bytes)  # before the minutes that what follows may take
    distance = _measure(job, plan, say=say)
    # the destination is only replaced after everything that was read has been verified
    with _destination(request, plan, job) as place, checkpoint.verified_beside():
        copy_files(plan.copies, place)
        if plan.copies and job.base is not None:
            state_scheduler(place, job.base.scheduler)
        written = plan.write(place / plan.file_name if plan.file_name and place.is_dir() else place, distance)
        verify_files(written.paths, written.specs, others=written.others)
        if plan.copies:
            check_complete(place)
        num_bytes = sum(path.stat().st_size for path in written.paths)
        if not is_one_file(request):
            write_card(place, card_facts(job, source, checkpoint, plan, written, distance))
    for remark in written.remarks:
        say(remark)
    seconds = time.perf_counter() - started
    say(f"wrote {len(written.specs)} tensors, {num_bytes / 1e9:.3f} GB in {request.dtype}, {seconds:.1f} s")
    if plan.copies and job.base is not None:
        say(f"copied {len(plan.copies)} files of {job.base.name}")
    say(f"saved to {request.out}")
    say(f"use: {plan.usage}")
    if request.push_to_hub is not None:
        push_folder(request.out, request.push_to_hub, private=request.private, say=say)


def describe(source: Source, checkpoint: ZeroCheckpoint) -> str:
    """Return a line about the chosen checkpoint."""
    numel = sum(placement.numel for placement in checkpoint.parameters.values())
    checked = "manifest verified" if source.is_verified else "no manifest to verify"
    return (
        f"reading {source.folder}: step {checkpoint.global_steps}, ZeRO stage {checkpoint.stage}, "
        f"{checkpoint.world_size} ranks, {numel:,} parameters, {checked}"
    )


def look_into(request: Request, source: Source, checkpoint: ZeroCheckpoint, *, say: Say) -> Job:
    """Find out what the checkpoint holds and which base it started from.

    Raises the same errors as consolidate.
    """
    held = _held_weights(request, checkpoint, say=say)
    base = choose_base(source, request.base)
    base_weights = weights_at_hand(base)
    adapter = find_adapter(held, lora_alpha=request.lora_alpha)
    if adapter is None:
        if request.lora_alpha is not None:
            raise ConfigError(f"--lora_alpha {request.lora_alpha:g}: {source.folder} has no LoRA; leave the option out")
        weights = restore_frozen(held, base_weights)
    else:
        say(f"the checkpoint has a LoRA on {len(adapter.layers)} layers")
        is_alone = len(held.parameters) == len(adapter.parameters)
        if is_alone and base_weights is None and request.format != "lora":
            base_weights = required_weights(base, why="a checkpoint that holds only a LoRA")
        weights = merge_adapter(held, adapter, base_weights)
    config = denoiser_config(source, base)
    return Job(
        request=request,
        held=held,
        weights=with_tables(weights, config, base_weights),
        adapter=adapter,
        config=config,
        base=base,
        base_weights=base_weights,
        record=_record(request, checkpoint),
    )


def _held_weights(request: Request, checkpoint: ZeroCheckpoint, *, say: Say) -> Weights:
    held: Weights = averaged(checkpoint) if request.ema else checkpoint
    if request.keys is None:
        return held
    inside = select_keys(held, request.keys)
    outside = len(held.parameters) - len(inside.parameters)
    say(f"took {len(inside.parameters)} parameters under {request.keys!r}, skipped {outside} others")
    return inside


def _measure(job: Job, plan: Plan, *, say: Say) -> Distance | None:
    """Compare with the base if it is available, and log how far the run has moved."""
    base = job.base_weights
    if base is None and plan.needs_distance:
        base = required_weights(job.base, why="--format lora of a full run")
    if base is None or not job.weights.parameters:
        known = "no base is known" if job.base is None else f"the weights of {job.base.name} are not available"
        say(f"distance from the base: not measured, because {known}")
        return None
    distance = measure_distance(job.weights, base)
    if not math.isfinite(distance.relative):
        raise CheckpointError(f"{job.weights.folder}: values are NaN or infinite: the run has diverged")
    say(distance.describe())
    return distance


def _destination(request: Request, plan: Plan, job: Job) -> AbstractContextManager[Path]:
    if is_one_file(request):
        return new_file(request.out, needed_bytes=plan.needed_bytes)
    return new_folder(request.out, needed_bytes=plan.needed_bytes, record=job.record)


def card_facts(
    job: Job, source: Source, checkpoint: ZeroCheckpoint, plan: Plan, written: Written, distance: Distance | None
) -> CardFacts:
    """Return the facts for this export's model card."""
    request, family = job.request, family_of(job.config)
    moved = {} if distance is None else {"relative distance from the base": f"{distance.relative:.3g}"}
    facts = CardFacts(
        format=request.format,  # type: ignore[arg-type]  # the table of formats has these names
        title=job.title,
        repo_id=request.push_to_hub,
        file_name=plan.file_name,
        holds_denoiser_only=request.format == "single-file" and request.base_file is None,
        dtype=request.dtype,
        is_ema=request.ema,
        base=request.base,
        family=None if family is None else family.name,
        vae=request.vae,
        steps=checkpoint.global_steps,
        zero_stage=checkpoint.stage,
        ranks=checkpoint.world_size,
        details={**written.details, **moved},
        license=request.license,
    )
    return facts if source.run is None else facts_of_run(source.run, facts)


def _record(request: Request, checkpoint: ZeroCheckpoint) -> dict[str, object]:
    return {
        "format": request.format,
        "dtype": request.dtype,
        "checkpoint": checkpoint.folder.name,
        "step": checkpoint.global_steps,
        "stage": checkpoint.stage,
        "world_size": checkpoint.world_size,
    }
