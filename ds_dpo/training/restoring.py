"""The third phase of a run: load its newest checkpoint, or begin with the weights of its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ds_dpo.checkpoints.best import BestCheckpoint
from ds_dpo.checkpoints.folder import Retention
from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.checkpoints.saving import Saving
from ds_dpo.checkpoints.store import CheckpointStore, LoadedCheckpoint
from ds_dpo.checkpoints.writer import CheckpointWriter
from ds_dpo.data.stream.loader import PairStream, open_stream
from ds_dpo.encoding.feed import build_encode
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.objectives.statistics import ObjectiveStatistic
from ds_dpo.reference.moving import MovingReference
from ds_dpo.reference.refresh import ReferenceRefresh
from ds_dpo.reference.residency import ReferenceGuard, ReferenceWatch
from ds_dpo.run_part import RunPart
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.step.preflight import look_at_start
from ds_dpo.storage.state_files import num_bytes
from ds_dpo.training.best import best_checkpoint
from ds_dpo.training.building import BuiltRun
from ds_dpo.training.micro_batches import MicroBatches
from ds_dpo.training.models import objective_of
from ds_dpo.training.optimizer_step import OptimizerStep
from ds_dpo.training.run_parts import restore_part, states_of
from ds_dpo.training.trainer import Progress, RunCheckpoints
from ds_dpo.watch.non_finite import build_non_finite


@dataclass(frozen=True, kw_only=True)
class RestoredRun:
    """A run that is ready to train. saved: the checkpoint that was loaded, None for a new run.

    parts: those that need no run folder, restored; held-out pairs and the watchdog join when the folder exists.
    watch: checks that the reference's weights do not change; None if no reference is loaded.
    """

    built: BuiltRun
    saved: LoadedCheckpoint | None
    progress: Progress
    optimizer_step: OptimizerStep
    parts: list[RunPart]
    checkpoints: RunCheckpoints
    watch: ReferenceGuard | None


def restore_run(built: BuiltRun, identity: RunIdentity) -> RestoredRun | Progress:
    """Load the checkpoint that the start asks for, by default the newest, and prepare everything that trains.

    Returns the progress if no step is left. Nothing is written. Raises DsDpoError on all ranks.
    """
    opened, engine = built.opened, built.engine
    config, log = opened.config, opened.log
    store = CheckpointStore(opened.folder.checkpoints, engine=engine, identity=identity, say=log.line)
    built.keep_average()
    moving = _moving_reference(built)
    opened.start.part(f"looking for a checkpoint in {opened.folder.checkpoints}")
    saved = store.load_newest() if not isinstance(opened.resume, int) else store.load_step(opened.resume)
    progress = _progress(built, saved)
    if progress.step >= config.max_train_steps:
        return progress
    other = None
    if progress.step == 0:
        built.start_weights()
        other = built.policy_start()
    statistic = _statistic(built)
    step = _preference_step(built, statistic)
    reference = built.models.reference
    watch = None if reference is None or moving else ReferenceWatch(reference, policy=engine.module)
    own = (built.models.adapter, statistic, _refresh(built, watch), moving)
    parts: list[RunPart] = [part for part in own if part is not None]
    parts.append(
        build_non_finite(
            config,
            engine,
            identity=identity,
            bucket_sizes=built.feed.pairs.bucket_sizes,
            folder=opened.folder,
            say=log.line,
        )
    )
    if saved is not None:
        for part in parts:
            restore_part(part, states_of(saved), saved.folder)
    best = best_checkpoint(config, opened.folder, say=log.line)
    checkpoints = RunCheckpoints(store=store, saving=_saving(built, identity, parts, progress, best), best=best)
    micro_batches = _micro_batches(built, step, progress)
    if other is not None:  # after the preflight, which compares policy and reference with the same weights
        built.begin_from(other)
    return RestoredRun(
        built=built,
        saved=saved,
        progress=progress,
        parts=parts,
        checkpoints=checkpoints,
        optimizer_step=OptimizerStep(
            engine=engine,
            preference_step=step,
            micro_batches=micro_batches,
            accumulation_steps=opened.resolved.accumulation_steps,
        ),
        watch=moving or watch,
    )


def _progress(built: BuiltRun, saved: LoadedCheckpoint | None) -> Progress:
    if saved is None:
        return Progress()
    progress = Progress(step=int(saved.client_state["step"]), pairs_seen=int(saved.client_state["pairs_seen"]))
    built.opened.log.line(f"resumed from step {progress.step}, {progress.pairs_seen} pairs seen")
    return progress


def _statistic(built: BuiltRun) -> ObjectiveStatistic | None:
    objective = built.opened.config.objective
    kind = OBJECTIVES[objective.type].statistic
    return None if kind is None else kind.of(objective)


def _preference_step(built: BuiltRun, statistic: ObjectiveStatistic | None) -> PreferenceStep:
    config, engine = built.opened.config, built.engine
    return PreferenceStep(
        policy=engine.policy,
        predict=FAMILIES[config.model.family].denoiser.predict,
        reference=built.models.reference,
        schedule=training_schedule(config.model, config.diffusion).to(engine.device),
        objective=objective_of(config),
        options=config.objective.loss_options(),
        statistic=statistic,
    )


def _moving_reference(built: BuiltRun) -> MovingReference | None:
    decay = built.opened.config.reference.ema_decay
    reference = built.models.reference
    if decay is None:
        return None
    assert isinstance(reference, FrozenCopy), "the configuration refuses a decay for any other reference"
    return MovingReference(reference, engine=built.engine, policy=built.engine.module, decay=decay)


def _refresh(built: BuiltRun, watch: ReferenceWatch | None) -> ReferenceRefresh | None:
    every_steps = built.opened.config.reference.refresh_every_steps
    reference = built.models.reference
    if every_steps is None:
        return None
    assert isinstance(reference, FrozenCopy), "the configuration refuses a refresh of any other reference"
    assert watch is not None, "every loaded reference has one"
    return ReferenceRefresh(
        reference, engine=built.engine, watch=watch, every_steps=every_steps, say=built.opened.log.line
    )


def _saving(
    built: BuiltRun,
    identity: RunIdentity,
    parts: Sequence[RunPart],
    progress: Progress,
    best: BestCheckpoint | None,
) -> Saving:
    """Require space for the run's checkpoints, log how much they need, and return what saves them when they are due."""
    opened = built.opened
    cadence, log = opened.config.cadence, opened.log
    writer = CheckpointWriter(
        opened.folder.checkpoints,
        engine=built.engine,
        identity=identity,
        retention=Retention(newest=cadence.keep_checkpoints, every_steps=cadence.keep_every_steps),
        say=log.line,
        best=best,
    )
    saving = Saving(
        writer,
        every=cadence,
        max_train_steps=opened.config.max_train_steps,
        saved_step=progress.step,
        say=log.line,
    )
    for line in writer.require_space(
        further_bytes=num_bytes([file for part in parts for file in part.files()]),
        saves_left=saving.saves_left(progress.step),
        in_background=cadence.save_in_background,
    ):
        log.line(line)
    return saving


def _micro_batches(built: BuiltRun, step: PreferenceStep, progress: Progress) -> MicroBatches:
    """Open the stream at the run's position, and check its first micro-batch before anything is trained."""
    opened = built.opened
    config, log = opened.config, opened.log
    opened.start.part("reading the first pairs")
    stream: PairStream[Any] = open_stream(
        built.feed.pairs,
        data=config.data,
        seed=config.seed,
        pairs_per_step=config.batch.pairs_per_step,
        micro_batch_pairs=config.batch.micro_batch_pairs,
        rank=opened.place.rank,
        world_size=opened.place.world_size,
        pairs_seen=progress.pairs_seen,
        say=log.line,
    )
    encode = build_encode(built.feed, built.models.encoders, model=config.model, device=opened.device)
    samples: Iterator[Any] = look_at_start(
        step,
        encode,
        iter(stream),
        is_resumed=progress.step > 0,
        precision=opened.resolved.precision,
        preflight=config.reference.preflight,
        say=log.line,
    )
    return MicroBatches(samples=samples, encode=encode, bad_rows=lambda: stream.bad_rows)
