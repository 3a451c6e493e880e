"""Where all parts of a run meet, in four phases: open, build, restore, run."""

from __future__ import annotations

from ds_dpo.checkpoints.identity import identity_of
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import gather_objects, is_main
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.evaluation.drawing.sampling import ValidationSampler
from ds_dpo.evaluation.pages.validation_pages import ValidationPages
from ds_dpo.models.training_schedule import training_sampler
from ds_dpo.run_folder.metrics import MetricsWriter
from ds_dpo.run_part import RunPart
from ds_dpo.supervision.rank import Supervision
from ds_dpo.training.building import BuiltRun, build_run
from ds_dpo.training.drawing import ValidationDrawing
from ds_dpo.training.opening import OpenedRun, open_run
from ds_dpo.training.record import RunRecord
from ds_dpo.training.restoring import RestoredRun, restore_run
from ds_dpo.training.run_parts import RunParts, restore_part, states_of
from ds_dpo.training.trainer import Cadence, Trainer
from ds_dpo.watch.held_out.evaluation import HeldOut
from ds_dpo.watch.held_out.record import HeldOutRecord
from ds_dpo.watch.held_out.setup import build_held_out, build_watchdog


def train(config: RunConfig, resolved: ResolvedDeepSpeed, place: RankEnvironment, supervision: Supervision) -> bool:
    """Train the run that config describes, from its start or its newest checkpoint; every rank of `place` calls it.

    Returns False if it was asked to stop before the end; the steps of this start are then saved. Raises DsDpoError on
    all ranks if something does not fit. A start that fails before its first step does not change the run folder.
    """
    opened = open_run(config, resolved, place)
    built = build_run(opened, is_asked_to_stop=lambda: _is_asked_to_stop(opened, supervision))
    if built is None:
        return False
    restored = restore_run(built, identity_of(opened.config, resolved))
    if restored is None:
        return True
    sampler = _sampler(built)
    _write_start(built)
    opened.log.open(opened.folder.log, last_step=restored.progress.step, max_train_steps=opened.config.max_train_steps)
    return _run(restored, sampler, supervision)


def _is_asked_to_stop(opened: OpenedRun, supervision: Supervision) -> bool:
    """Return on all ranks whether any rank was asked to stop. The trainer looks for the STOP file, this does not."""
    is_asked = any(gather_objects(supervision.stop.is_asked(look_for_file=False)))
    if is_asked:
        opened.log.line("stopped as asked before training began; the same command starts at the same step")
    return is_asked


def _write_start(built: BuiltRun) -> None:
    opened, resolved = built.opened, built.opened.resolved
    with raised_everywhere():
        if is_main():
            opened.folder.write_start(
                opened.config, resolved.settings, world_size=resolved.world_size, data=built.feed.counts
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
    metrics = MetricsWriter(folder.path, last_step=restored.progress.step) if is_main() else None
    record = RunRecord(log=log, metrics=metrics)
    trainer = Trainer(
        optimizer_step=restored.optimizer_step,
        progress=restored.progress,
        cadence=Cadence(
            max_train_steps=config.max_train_steps,
            pairs_per_step=config.batch.pairs_per_step,
            every=config.cadence,
        ),
        parts=_parts(restored, metrics),
        checkpoints=restored.checkpoints,
        record=record,
        supervision=supervision,
        drawing=None
        if sampler is None
        else ValidationDrawing(
            module=built.engine.module,
            sampler=sampler,
            pages=ValidationPages(folder.samples, config, say=log.line),
            metrics=metrics,
        ),
        max_bad_rows=config.data.max_bad_rows,
    )
    try:
        if _is_asked_to_stop(opened, supervision):
            return False
        is_done = trainer.run()
        if restored.watch is not None:
            restored.watch.require_unchanged()
        if is_done:
            log.line(f"done; export it: python scripts/consolidate.py {folder.path} {folder.path / 'export'}")
        return is_done
    finally:
        restored.checkpoints.saving.abandon()
        record.close()


def _parts(restored: RestoredRun, metrics: MetricsWriter | None) -> RunParts:
    """Return all parts of the run: the restored ones, held-out pairs and the watchdog."""
    config, engine, say = restored.built.opened.config, restored.built.engine, restored.built.opened.log.line
    held_out = _held_out(restored, metrics)
    watchdog = build_watchdog(config, engine, held_out, say=say)
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
