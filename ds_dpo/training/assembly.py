"""Where all parts of a run meet: a configuration becomes data, models, engine, checkpoints and a trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.checkpoints.folder import Retention, RunIdentity
from ds_dpo.checkpoints.saving import Saving
from ds_dpo.checkpoints.store import CheckpointStore, LoadedCheckpoint
from ds_dpo.checkpoints.writer import CheckpointWriter
from ds_dpo.config.identity import identity
from ds_dpo.config.run import RunConfig
from ds_dpo.data.stream.loader import PairStream, open_stream
from ds_dpo.distributed.collectives import gather_objects, is_main
from ds_dpo.distributed.environment import RankEnvironment, export_environment
from ds_dpo.distributed.together import node_turns, raised_everywhere
from ds_dpo.encoding.feed import PairFeed, build_encode, open_feed
from ds_dpo.engine.engine import Engine, build_engine, pick_device, silence_deepspeed, start_communication
from ds_dpo.engine.settings import ResolvedDeepSpeed, describe
from ds_dpo.evaluation.drawing.sampling import ValidationSampler
from ds_dpo.evaluation.pages.validation_pages import ValidationPages
from ds_dpo.models.loading import (
    file_weights,
)
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.models.start import checkpoint_start, pin_start
from ds_dpo.models.training_schedule import training_sampler, training_schedule
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.objectives.statistics import ObjectiveStatistic
from ds_dpo.precision import Precision
from ds_dpo.reference.cache.feed import open_covering_errors, with_reference_errors
from ds_dpo.reference.refresh import ReferenceRefresh
from ds_dpo.reference.residency import ReferenceWatch
from ds_dpo.run_folder.folder import RunFolder
from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.metrics import MetricsWriter
from ds_dpo.run_part import RunPart
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.step.preflight import look_at_start
from ds_dpo.storage.state_files import num_bytes
from ds_dpo.supervision.rank import Supervision
from ds_dpo.training.models import Models, load_models, objective_of
from ds_dpo.training.trainer import Cadence, Progress, Trainer
from ds_dpo.watch.held_out.evaluation import HeldOut
from ds_dpo.watch.held_out.pairs import HeldOutPairs
from ds_dpo.watch.held_out.record import HeldOutRecord
from ds_dpo.watch.held_out.setup import build_held_out, build_watchdog, load_held_out
from ds_dpo.watch.non_finite import build_non_finite


def train(config: RunConfig, resolved: ResolvedDeepSpeed, place: RankEnvironment, supervision: Supervision) -> bool:
    """Train, or go on training, the run that config describes; every rank of `place` calls it.

    Returns False where it was asked to stop before the end; what there was to save is saved then. Raises DsDpoError on
    all ranks together where something does not fit; a start that fails before its first step leaves the run folder as
    it was.
    """
    silence_deepspeed()
    config = pin_start(config)
    log = RunLog(speaks=place.rank == 0)
    folder = RunFolder(Path(config.output_dir))
    changes = folder.require_same_run(config, precision=resolved.precision)
    for line in [*describe(config, resolved), *changes]:
        log.line(line)
    export_environment(place)
    device = pick_device(place.local_rank)
    timeout = timedelta(minutes=config.supervision.collective_timeout_minutes)
    start_communication(timeout=timeout, device=device)

    feed = _open_pairs(config, place, precision=resolved.precision, log=log)
    errors = open_covering_errors(config, say=log.line) if config.reference.residency == "cached" else None
    models = load_models(
        config,
        resolved,
        place,
        device=device,
        with_encoders=_keeps_encoders(config, feed) or config.held_out.every_steps is not None,
        log=log,
    )
    if _is_asked_to_stop(supervision, log):
        return False
    held_out_pairs = _held_out_pairs(config, feed, models, place, device=device, log=log)
    if not _keeps_encoders(config, feed):
        models = replace(models, encoders=None)
    if errors is not None:
        feed = with_reference_errors(feed, errors, config=config, start=models.start, precision=resolved.precision)
    engine = build_engine(
        models.policy,
        settings=resolved.settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=config.max_train_steps,
        # an export of an adapter alone takes the rest from model.pretrained
        saves_frozen_weights=models.adapter is None or config.model.unet_init is not None,
    )
    run_identity = identity_of(config, resolved)
    store = CheckpointStore(folder.checkpoints, engine=engine, identity=run_identity, say=log.line)
    if config.ema.decay is not None:
        engine.keep_average(decay=config.ema.decay)
    saved = store.load_newest()
    progress = _progress(saved, log)
    if progress.step >= config.max_train_steps:
        log.line(f"{folder.path} is at step {progress.step} of {config.max_train_steps}: nothing is left to do")
        return True
    if progress.step == 0:
        if models.adapter is None:  # whose weights have no values in the file
            engine.set_master_weights(checkpoint_start(config.model) or file_weights(config.model))
        if config.ema.decay is not None:
            engine.keep_average(decay=config.ema.decay)  # anew: from the file's own values
    statistic = _statistic(config)
    step = _step(config, engine, models, statistic=statistic)
    watch = ReferenceWatch(models.reference, policy=engine.module) if models.reference is not None else None
    parts = _parts(models, statistic, _refresh(config, engine, models, watch, log=log))
    parts.append(
        build_non_finite(
            config,
            engine,
            identity=run_identity,
            bucket_sizes=feed.pairs.bucket_sizes,
            folder=folder,
            say=log.line,
        )
    )
    _restore(parts, saved)
    saving = _saving(config, folder, engine, run_identity, parts, progress, log=log)
    stream = _open_stream(config, feed, place, progress=progress, log=log)
    encode = build_encode(feed, models.encoders, family=config.model.family, device=device)
    batches = look_at_start(
        step, encode, iter(stream), is_resumed=progress.step > 0, precision=resolved.precision, say=log.line
    )
    sample = _sampler(config, engine, models)

    _write_start(folder, config, resolved, feed)
    log.open(folder.log, last_step=progress.step, max_train_steps=config.max_train_steps)
    writer = MetricsWriter(folder.path, last_step=progress.step) if is_main() else None
    held_out = _held_out(config, held_out_pairs, engine, models, folder, progress, log=log, writer=writer)
    watchdog = build_watchdog(config, engine, held_out, say=log.line)
    late_parts = [part for part in (held_out, watchdog) if part is not None]
    _restore(late_parts, saved)
    parts += late_parts
    trainer = Trainer(
        engine=engine,
        step=step,
        batches=batches,
        bad_rows=lambda: stream.bad_rows,
        encode=encode,
        cadence=_cadence(config, resolved),
        progress=progress,
        store=store,
        saving=saving,
        parts=parts,
        watchdog=watchdog,
        stop=supervision.stop,
        hang=supervision.hang,
        log=log,
        writer=writer,
        sample=sample,
        save_samples=partial(_save_samples, ValidationPages(folder.samples, config, say=log.line), writer),
        max_bad_rows=config.data.max_bad_rows,
    )
    try:
        if _is_asked_to_stop(supervision, log):
            return False
        is_done = trainer.run()
        if watch is not None:
            watch.require_unchanged()
        if is_done:
            log.line(f"done; export it: python scripts/consolidate.py {folder.path} {folder.path / 'export'}")
        return is_done
    finally:
        saving.abandon()
        log.close()
        if writer is not None:
            writer.close()


def _is_asked_to_stop(supervision: Supervision, log: RunLog) -> bool:
    """Agree whether any rank was asked so before training began; the STOP file is looked for once it has."""
    is_asked = any(gather_objects(supervision.stop.is_asked(look_for_file=False)))
    if is_asked:
        log.line("stopped as asked before training began; the same command starts from where this one did")
    return is_asked


def _open_pairs(config: RunConfig, place: RankEnvironment, *, precision: Precision, log: RunLog) -> PairFeed:
    with node_turns(place):  # the node's first rank downloads and counts, the others find its files
        return open_feed(config, precision=precision, say=log.line)


def _keeps_encoders(config: RunConfig, feed: PairFeed) -> bool:
    return feed.needs_encoders or config.cadence.sample_every_steps is not None


def identity_of(config: RunConfig, resolved: ResolvedDeepSpeed) -> RunIdentity:
    fields = identity(config, resolved.precision)
    return RunIdentity(
        world_size=resolved.world_size,
        stage=resolved.stage,
        precision=resolved.precision,
        fingerprint=hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(),
    )


def _progress(saved: LoadedCheckpoint | None, log: RunLog) -> Progress:
    if saved is None:
        return Progress()
    progress = Progress(step=int(saved.client_state["step"]), pairs_seen=int(saved.client_state["pairs_seen"]))
    log.line(f"resumed from step {progress.step}, {progress.pairs_seen} pairs seen")
    return progress


def _statistic(config: RunConfig) -> ObjectiveStatistic | None:
    kind = OBJECTIVES[config.objective.type].statistic
    return None if kind is None else kind.of(config.objective)


def _step(config: RunConfig, engine: Engine, models: Models, *, statistic: ObjectiveStatistic | None) -> PreferenceStep:
    return PreferenceStep(
        policy=engine.policy,
        reference=models.reference,
        schedule=training_schedule(config.model, config.diffusion).to(engine.device),
        objective=objective_of(config),
        options=config.objective.loss_options(),
        statistic=statistic,
    )


def _refresh(
    config: RunConfig, engine: Engine, models: Models, watch: ReferenceWatch | None, *, log: RunLog
) -> ReferenceRefresh | None:
    every_steps = config.reference.refresh_every_steps
    if every_steps is None:
        return None
    assert isinstance(models.reference, FrozenCopy)
    assert watch is not None
    return ReferenceRefresh(models.reference, engine=engine, watch=watch, every_steps=every_steps, say=log.line)


def _parts(models: Models, statistic: ObjectiveStatistic | None, refresh: ReferenceRefresh | None) -> list[RunPart]:
    """Return what follows the run beside the weights; their order is the order in which they see each step."""
    return [part for part in (models.adapter, statistic, refresh) if part is not None]


def _held_out_pairs(
    config: RunConfig, feed: PairFeed, models: Models, place: RankEnvironment, *, device: torch.device, log: RunLog
) -> HeldOutPairs | None:
    if config.held_out.every_steps is None:
        return None
    assert models.encoders is not None, "loaded where held-out pairs are encoded"
    return load_held_out(config, feed, models.encoders, place, device=device, say=log.line)


def _held_out(
    config: RunConfig,
    pairs: HeldOutPairs | None,
    engine: Engine,
    models: Models,
    folder: RunFolder,
    progress: Progress,
    *,
    log: RunLog,
    writer: MetricsWriter | None,
) -> HeldOut | None:
    if pairs is None:
        return None
    record = HeldOutRecord(folder.held_out, last_step=progress.step, writer=writer, say=log.line)
    return build_held_out(config, pairs, engine, models.reference, record=record, say=log.line)


def _restore(parts: Sequence[RunPart], saved: LoadedCheckpoint | None) -> None:
    """Let each part go on from a checkpoint; one that is new to the run starts fresh."""
    if saved is None:
        return
    states = saved.client_state.get("parts", {})
    for part in parts:
        if part.name in states:
            part.restore(states[part.name], saved.folder)


def _open_stream(
    config: RunConfig, feed: PairFeed, place: RankEnvironment, *, progress: Progress, log: RunLog
) -> PairStream[Any]:
    return open_stream(
        feed.pairs,
        data=config.data,
        seed=config.seed,
        pairs_per_step=config.batch.pairs_per_step,
        micro_batch_pairs=config.batch.micro_batch_pairs,
        rank=place.rank,
        world_size=place.world_size,
        pairs_seen=progress.pairs_seen,
        say=log.line,
    )


def _write_start(folder: RunFolder, config: RunConfig, resolved: ResolvedDeepSpeed, feed: PairFeed) -> None:
    with raised_everywhere():
        if is_main():
            folder.write_start(config, resolved.settings, world_size=resolved.world_size, data=feed.counts)


def _cadence(config: RunConfig, resolved: ResolvedDeepSpeed) -> Cadence:
    return Cadence(
        max_train_steps=config.max_train_steps,
        accumulation_steps=resolved.accumulation_steps,
        pairs_per_step=config.batch.pairs_per_step,
        every=config.cadence,
    )


def _saving(
    config: RunConfig,
    folder: RunFolder,
    engine: Engine,
    run_identity: RunIdentity,
    parts: Sequence[RunPart],
    progress: Progress,
    *,
    log: RunLog,
) -> Saving:
    """Require room for the run's checkpoints, say what they take, and return what writes them when they are due."""
    cadence = config.cadence
    writer = CheckpointWriter(
        folder.checkpoints,
        engine=engine,
        identity=run_identity,
        retention=Retention(newest=cadence.keep_checkpoints, every_steps=cadence.keep_every_steps),
        say=log.line,
    )
    saving = Saving(
        writer,
        every=cadence,
        max_train_steps=config.max_train_steps,
        saved_step=progress.step,
        say=log.line,
    )
    further_bytes = num_bytes([file for part in parts for file in part.files()])
    for line in writer.require_space(
        further_bytes=further_bytes,
        saves_left=saving.saves_left(progress.step),
        in_background=cadence.save_in_background,
    ):
        log.line(line)
    return saving


def _sampler(config: RunConfig, engine: Engine, models: Models) -> ValidationSampler | None:
    if config.cadence.sample_every_steps is None:
        return None
    validation, encoders = config.validation, models.encoders
    assert encoders is not None, "loaded where images are drawn"
    return ValidationSampler(
        unet=engine.module,
        vae=encoders.vae,
        tokenizers=[tower.tokenizer for tower in encoders.text.towers],
        text_encoders=[tower.encoder for tower in encoders.text.towers],
        scheduler=training_sampler(config.model, config.diffusion),
        prompts=validation.prompts,
        seeds=validation.seeds,
        num_inference_steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        resolution=config.data.resolution,
    )


def _save_samples(pages: ValidationPages, writer: MetricsWriter | None, images: Tensor, step: int) -> None:
    pages.write(images, step=step)
    if writer is not None:
        writer.write_images("validation", images, step=step)
