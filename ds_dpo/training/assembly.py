"""Where all parts of a run meet, in four phases: open, build, restore, run."""

from __future__ import annotations

from ds_dpo.checkpoints.identity import RunIdentity, identity_of
from ds_dpo.config.command_text import command_text
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.evaluation.drawing.sampling import ValidationSampler
from ds_dpo.evaluation.pages.validation_pages import ValidationPages
from ds_dpo.models.training_schedule import training_sampler
from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.metrics import MetricsWriter
from ds_dpo.run_folder.progress import Length
from ds_dpo.run_folder.resuming import Resume
from ds_dpo.run_part import RunPart
from ds_dpo.supervision.rank import Supervision
from ds_dpo.training.best import best_checkpoint
from ds_dpo.training.building import BuiltRun, build_run
from ds_dpo.training.drawing import ValidationDrawing
from ds_dpo.training.opening import OpenedRun, open_run
from ds_dpo.training.record import RunRecord
from ds_dpo.training.restoring import RestoredRun, restore_run
from ds_dpo.training.run_parts import RunParts, restore_part, states_of
from ds_dpo.training.start import Start
from ds_dpo.training.trainer import Cadence, Progress, Trainer, draw_missing
from ds_dpo.training.validation_scores import ValidationScores
from ds_dpo.watch.held_out.evaluation import HeldOut
from ds_dpo.watch.held_out.record import HeldOutRecord
from ds_dpo.watch.held_out.setup import build_held_out, build_watchdog


def train(
    config: RunConfig,
    resolved: ResolvedDeepSpeed,
    place: RankEnvironment,
    supervision: Supervision,
    *,
    log: RunLog,
    resume: Resume = None,
) -> bool:
    """Train the run that config describes, from its start or its newest checkpoint; every rank of `place` calls it.

    resume: another checkpoint than the newest, by its step; later ones are set aside before training begins.
    Returns False if it was asked to stop before the end; the steps of this start are then saved. Raises on all ranks
    StopAskedError if that comes before the first step, and DsDpoError if something does not fit. A start that fails
    before its first step does not change the run folder.
    """
    stop = supervision.stop
    start = Start(say=log.line, is_asked=lambda: stop.is_asked_since_start(look_for_file=place.rank == 0))
    opened = open_run(config, resolved, place, log=log, start=start, resume=resume)
    built = build_run(opened)
    restored = restore_run(built, _identity(built))
    if isinstance(restored, Progress):
        _complete(built, restored)
        return True
    sampler = _sampler(built)
    start.part(f"training begins after step {restored.progress.step} of {opened.config.max_train_steps}")
    if isinstance(resume, int):
        restored.checkpoints.store.go_back_to(resume)
    _write_start(built)
    _open_log(built, restored.progress)
    return _run(restored, sampler, supervision)


def _complete(built: BuiltRun, progress: Progress) -> None:
    """Draw the last images if a kill came before them: no step is left to train."""
    opened = built.opened
    _open_log(built, progress)
    metrics = _metrics(opened, progress)
    drawing = _drawing(built, _sampler(built), metrics, last_step=progress.step)
    draw_missing(drawing, _cadence(opened.config), step=progress.step)
    best = best_checkpoint(opened.config, opened.folder, say=opened.log.line)
    if best is not None and is_main():
        best.mark(progress.step)
    if metrics is not None:
        metrics.close()
    path, last = opened.folder.path, opened.config.max_train_steps
    opened.log.line(f"{path} is at step {progress.step} of {last}: nothing is left to do")


def _metrics(opened: OpenedRun, progress: Progress) -> MetricsWriter | None:
    """Return rank 0's writer, None on other ranks."""
    if not is_main():
        return None
    metrics = MetricsWriter(
        opened.folder.path,
        last_step=progress.step,
        has_tensorboard="tensorboard" in opened.config.trackers,
        trackers=opened.trackers,
    )
    if metrics.num_rolled_back:
        opened.log.line(
            f"an earlier start came further than step {progress.step}: {metrics.num_rolled_back} lines of "
            "metrics.jsonl moved to metrics.rolled_back.jsonl"
        )
    return metrics


def _open_log(built: BuiltRun, progress: Progress) -> None:
    opened = built.opened
    length = Length(max_train_steps=opened.config.max_train_steps, num_pairs=sum(built.feed.pairs.bucket_sizes))
    opened.log.open(opened.folder.log, last_step=progress.step, length=length)


def _cadence(config: RunConfig) -> Cadence:
    return Cadence(
        max_train_steps=config.max_train_steps, pairs_per_step=config.batch.pairs_per_step, every=config.cadence
    )


def _drawing(
    built: BuiltRun, sampler: ValidationSampler | None, metrics: MetricsWriter | None, *, last_step: int
) -> ValidationDrawing | None:
    if sampler is None:
        return None
    opened = built.opened
    scores = None
    if opened.scorers:
        scores = ValidationScores(
            opened.folder.validation,
            opened.scorers,
            prompts=sampler.prompts,
            last_step=last_step,
            writer=metrics,
            say=opened.log.line,
        )
    return ValidationDrawing(
        module=built.engine.module,
        sampler=sampler,
        pages=ValidationPages(opened.folder.samples, opened.config, say=opened.log.line),
        metrics=metrics,
        say=opened.log.line,
        scores=scores,
    )


def _identity(built: BuiltRun) -> RunIdentity:
    opened = built.opened
    return identity_of(
        opened.config,
        opened.resolved,
        accepted=opened.folder.accepted_changes(opened.config),
        contents={"data": built.feed.fingerprint, "models": built.contents.hashes},
    )


def _write_start(built: BuiltRun) -> None:
    opened, resolved = built.opened, built.opened.resolved
    with raised_everywhere():
        if is_main():
            opened.folder.write_start(
                opened.config,
                resolved.settings,
                world_size=resolved.world_size,
                data=built.feed.data_set.as_saved(),
                device=opened.picked.words,
                models={"hashes": built.contents.hashes, "commits": built.contents.commits},
            )


def _sampler(built: BuiltRun) -> ValidationSampler | None:
    config, encoders = built.opened.config, built.models.encoders
    if config.cadence.sample_every_steps is None:
        return None
    assert encoders is not None, "loaded if images are drawn"
    return ValidationSampler(
        denoiser=built.engine.module,
        vae=encoders.vae,
        tokenizers=[tower.tokenizer for tower in encoders.text.towers],
        text_encoders=[tower.encoder for tower in encoders.text.towers],
        scheduler=training_sampler(config.model, config.diffusion),
        prompts=config.validation.prompts,
        seeds=config.validation.seeds,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        resolution=config.data.resolution,
    )


def _run(restored: RestoredRun, sampler: ValidationSampler | None, supervision: Supervision) -> bool:
    """Add the parts that write into the run folder, which exists by now, and train; returns what `train` does."""
    built, opened = restored.built, restored.built.opened
    config, folder, log = opened.config, opened.folder, opened.log
    metrics = _metrics(opened, restored.progress)
    record = RunRecord(log=log, metrics=metrics)
    trainer = Trainer(
        optimizer_step=restored.optimizer_step,
        progress=restored.progress,
        cadence=_cadence(config),
        parts=_parts(restored, metrics),
        checkpoints=restored.checkpoints,
        record=record,
        supervision=supervision,
        drawing=_drawing(built, sampler, metrics, last_step=restored.progress.step),
        max_bad_rows=config.data.max_bad_rows,
    )
    try:
        is_done = trainer.run()
        if restored.watch is not None:
            restored.watch.require_unchanged()
        if is_done:
            log.line(f"done; export it: {command_text('consolidate', folder.path, folder.path / 'export')}")
        return is_done
    finally:
        restored.checkpoints.saving.abandon()
        record.close()


def _parts(restored: RestoredRun, metrics: MetricsWriter | None) -> RunParts:
    """Return all parts of the run: the restored ones, held-out pairs and the watchdog."""
    config, engine, say = restored.built.opened.config, restored.built.engine, restored.built.opened.log.line
    held_out = _held_out(restored, metrics)
    watchdog = build_watchdog(config, engine, held_out, restored.checkpoints.best, say=say)
    late: list[RunPart] = [part for part in (held_out, watchdog) if part is not None]
    if restored.saved is not None:
        for part in late:
            restore_part(part, states_of(restored.saved), restored.saved.folder)
    return RunParts([*restored.parts, *([] if held_out is None else [held_out])], watchdog=watchdog)


def _held_out(restored: RestoredRun, metrics: MetricsWriter | None) -> HeldOut | None:
    built, opened = restored.built, restored.built.opened
    if built.held_out_pairs is None:
        return None
    say = opened.log.line
    record = HeldOutRecord(opened.folder.held_out, last_step=restored.progress.step, writer=metrics, say=say)
    return build_held_out(
        opened.config, built.held_out_pairs, built.engine, built.models.reference, record=record, say=say
    )
