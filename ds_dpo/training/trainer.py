"""The loop: optimizer steps, and after each step what is due: metrics, a checkpoint, images, the end."""

from __future__ import annotations

from dataclasses import dataclass

from ds_dpo.checkpoints.best import BestCheckpoint
from ds_dpo.checkpoints.saving import Saving
from ds_dpo.checkpoints.store import CheckpointStore
from ds_dpo.checkpoints.writer import Contents
from ds_dpo.config.cadence import CadenceConfig
from ds_dpo.data.stream.bad_rows import too_many_bad_rows
from ds_dpo.distributed.collectives import gather_objects, is_main
from ds_dpo.distributed.together import said_once
from ds_dpo.errors import CheckpointError, CollapseError
from ds_dpo.supervision.rank import Supervision
from ds_dpo.training.drawing import ValidationDrawing
from ds_dpo.training.optimizer_step import OptimizerStep, StepOutcome, peak_memory_gib
from ds_dpo.training.record import RunRecord
from ds_dpo.training.run_parts import RunParts, states_of
from ds_dpo.watch.watchdog import Verdict, Watchdog


@dataclass
class Progress:
    """The progress of a run. A checkpoint holds it, the engine's state and the states of the run's parts."""

    step: int = 0
    pairs_seen: int = 0


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When things are due. max_train_steps, every: in optimizer steps. pairs_per_step: of all ranks."""

    max_train_steps: int
    pairs_per_step: int
    every: CadenceConfig

    def is_due(self, step: int, every: int | None) -> bool:
        """Return whether something is due at a step: at each multiple of `every`, if set, and at the end of the run."""
        return every is not None and (step % every == 0 or step == self.max_train_steps)

    def draws_at(self, step: int) -> bool:
        """Return whether validation images of a step are due."""
        return self.is_due(step, self.every.sample_every_steps)


@dataclass(frozen=True, kw_only=True)
class RunCheckpoints:
    """The checkpoints of a run: store reads them, saving writes them when they are due, best marks one of them.

    best: None if the run keeps none by a metric.
    """

    store: CheckpointStore
    saving: Saving
    best: BestCheckpoint | None = None

    def mark_best(self, step: int) -> None:
        """Mark the best checkpoint up to a step; all ranks may call it."""
        if self.best is not None and is_main():
            self.best.mark(step)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Runs the loop and decides when to log, save, draw and stop. The loss belongs to PreferenceStep.

    drawing: None if the run draws no validation images. max_bad_rows: see too_many_bad_rows.
    """

    optimizer_step: OptimizerStep
    progress: Progress
    cadence: Cadence
    parts: RunParts
    checkpoints: RunCheckpoints
    record: RunRecord
    supervision: Supervision
    drawing: ValidationDrawing | None
    max_bad_rows: int

    def run(self) -> bool:
        """Train to max_train_steps. Returns False if a request to stop came first. The last state is saved."""
        stopped = False
        draw_missing(self.drawing, self.cadence, step=self.progress.step)
        self.checkpoints.mark_best(self.progress.step)
        self.parts.begin(self.progress.step)
        self.supervision.hang.start()
        while self.progress.step < self.cadence.max_train_steps and not stopped:
            stopped = self._step()
            self._raise_error_of_parts()
            if self._follow_watchdog():
                continue
            self._save_if_due(stopped=stopped)
            if not stopped and self.cadence.draws_at(self.progress.step):
                self._draw()
            self._save_best()
        if stopped:
            self._clear_stop_file()
            self.record.line(f"stopped at step {self.progress.step} as asked; the same command resumes from there")
        return not stopped

    # ---- a step and its numbers ----

    def _step(self) -> bool:
        """Do one optimizer step and record it; returns whether any rank was asked to stop."""
        hang = self.supervision.hang
        outcome = self.optimizer_step.run(self.parts, counters=self._counters, beat=hang.beat)
        self.progress.step += 1
        self.progress.pairs_seen += self.cadence.pairs_per_step
        with hang.pause("completing a checkpoint"):
            self.checkpoints.saving.take(outcome.totals)
        self._require_readable_rows(int(outcome.totals["bad_rows"]))
        with hang.pause("what follows a step"):
            metrics = self.parts.after_step(self.progress.step, self._metrics(outcome))
        is_asked = outcome.totals["asked"] > 0
        hang.end_step()
        due = self.cadence.is_due(self.progress.step, self.cadence.every.log_every_steps)
        self.record.step(metrics, due=due or is_asked)
        return is_asked

    def _counters(self) -> dict[str, float]:
        """Return the numbers that each step sums over ranks: requests to stop, bad rows, and those of saving."""
        asked = self.supervision.stop.is_asked(look_for_file=is_main())
        num_bad_rows = len(self.optimizer_step.micro_batches.bad_rows())
        return {"asked": float(asked), "bad_rows": float(num_bad_rows), **self.checkpoints.saving.counters()}

    def _metrics(self, outcome: StepOutcome) -> dict[str, float]:
        engine = self.optimizer_step.engine
        metrics = {"step": self.progress.step, **outcome.means}
        if outcome.gradient_norm is not None:
            metrics["gradient_norm"] = outcome.gradient_norm
        metrics |= {
            "learning_rate": outcome.learning_rate,
            "pairs_seen": self.progress.pairs_seen,
            "pairs_per_second": self.cadence.pairs_per_step / outcome.step_seconds,
            "step_seconds": outcome.step_seconds,
            "data_seconds": outcome.data_seconds,
            "peak_memory_gib": peak_memory_gib(engine.device),
            "skipped_steps": engine.skipped_steps,
            "bad_rows": outcome.totals["bad_rows"],
            "failed_saves": self.checkpoints.saving.num_failed,
        }
        if engine.loss_scale is not None:
            metrics["loss_scale"] = engine.loss_scale
        return metrics

    def _require_readable_rows(self, num_bad_rows: int) -> None:
        """Raise DataError on all ranks, with the rows, if more rows than allowed are unreadable."""
        if num_bad_rows <= self.max_bad_rows:
            return
        own_rows = [str(row) for row in self.optimizer_step.micro_batches.bad_rows()]
        error = too_many_bad_rows(
            [row for rows in gather_objects(own_rows) for row in rows],
            limit=self.max_bad_rows,
        )
        assert error is not None, "the number over all ranks is above the limit"
        raise said_once(error)

    def _raise_error_of_parts(self) -> None:
        error = self.parts.take_error()
        if error is not None:
            with self.supervision.hang.pause("saving"):
                self._save(is_last=True)
            raise error

    # ---- checkpoints ----

    def _save_if_due(self, *, stopped: bool) -> None:
        step = self.progress.step
        if not (stopped or self.checkpoints.saving.is_due(step)):
            return
        try:
            with self.supervision.hang.pause("saving"):
                self._save(is_last=stopped or step == self.cadence.max_train_steps)
        except CheckpointError:
            if stopped:
                self._clear_stop_file()  # the run did stop: the next start must not stop at once
            raise

    def _save_best(self) -> None:
        """Save this step if it was evaluated and is the best so far; then the best checkpoint is marked."""
        best, step = self.checkpoints.best, self.progress.step
        if best is None or not best.is_new_best(step):
            return
        with self.supervision.hang.pause("saving"):
            self._save()
        self.checkpoints.mark_best(step)

    def _clear_stop_file(self) -> None:
        if is_main():
            self.supervision.stop.clear_file()

    def _save(self, *, is_last: bool = False, renews: bool = False) -> None:
        """Save this step, unless it is already saved. is_last, renews: see Saving.save."""
        saving = self.checkpoints.saving
        if self.parts.watchdog is not None:
            saving.protect(self.parts.watchdog.good_step)
        saving.save(
            self._contents,
            step=self.progress.step,
            is_last=is_last,
            renews=renews,
            first=self.record.flush,  # so that a checkpoint is never newer than its metrics
        )

    def _contents(self) -> Contents:
        return Contents(
            client_state={
                "step": self.progress.step,
                "pairs_seen": self.progress.pairs_seen,
                "parts": self.parts.states(),
            },
            files=self.parts.files(),
        )

    # ---- the watchdog ----

    def _follow_watchdog(self) -> bool:
        """Follow the watchdog's verdict. Returns whether the run rolled back, so that nothing else is due."""
        watchdog, verdict = self.parts.watchdog, self.parts.take_verdict()
        if watchdog is None or verdict is None:
            return False
        with self.supervision.hang.pause("following the watchdog"):
            if verdict.action == "stop":
                self._stop_collapsing(verdict)
            return self._roll_back(watchdog, verdict)

    def _stop_collapsing(self, verdict: Verdict) -> None:
        """Save, then raise CollapseError on all ranks."""
        self._save(is_last=True)
        error = CollapseError(
            f"{verdict.sentence}; stopped at step {self.progress.step}, which is saved: the same command resumes from "
            "there; a new run with a lower learning_rate or a higher beta can avoid the collapse"
        )
        raise said_once(error)

    def _roll_back(self, watchdog: Watchdog, verdict: Verdict) -> bool:
        """Load the newest checkpoint of the verdict's good step or before. Returns False if there is none.

        pairs_seen does not go back, so that the run does not train again at once on the pairs that led to the collapse.
        """
        self.checkpoints.saving.settle()
        if not self.checkpoints.store.set_aside_after(verdict.good_step):
            watchdog.lower_rate(f"{verdict.sentence}; there is no checkpoint of step {verdict.good_step} or before: ")
            return False
        left = self.progress.step
        saved = self.checkpoints.store.load_newest()
        assert saved is not None, "set_aside_after kept one"
        self.progress.step = int(saved.client_state["step"])
        self.parts.go_back(saved, step=self.progress.step)
        self.record.rewind(self.progress.step)
        self.checkpoints.mark_best(self.progress.step)
        self.record.line(f"{verdict.sentence}; rolled back from step {left} to {saved.folder}")
        watchdog.after_roll_back(states_of(saved).get(watchdog.name, {}))
        self._save(renews=True)  # with the lower rate and the present pairs_seen
        return True

    # ---- images ----

    def _draw(self) -> None:
        if self.drawing is not None:
            with self.supervision.hang.pause("drawing validation images"):
                self.drawing.draw(step=self.progress.step)


def draw_missing(drawing: ValidationDrawing | None, cadence: Cadence, *, step: int) -> None:
    """Draw the images of the step at which a start begins, if they are due and do not exist; all ranks call this.

    A kill or a stop after the step was saved may have come before its images. Those of step 0 are always drawn.
    """
    if drawing is not None and (step == 0 or (cadence.draws_at(step) and drawing.is_missing(step))):
        drawing.draw(step=step)
