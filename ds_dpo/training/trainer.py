"""The loop: micro-batches into updates, and after each what is due: metrics, a checkpoint, pictures, an end."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_dpo.batch import PreferenceBatch
from ds_dpo.checkpoints.saving import Saving
from ds_dpo.checkpoints.store import CheckpointStore
from ds_dpo.checkpoints.writer import Contents
from ds_dpo.config.cadence import CadenceConfig
from ds_dpo.distributed.collectives import gather_objects, is_main
from ds_dpo.distributed.together import said_once
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import CheckpointError, CollapseError, DataError
from ds_dpo.process.fault_points import reach
from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.metrics import MetricsWriter, StepSums
from ds_dpo.run_part import RunPart
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.supervision.hang_watch import HangWatch
from ds_dpo.supervision.stop import StopRequest
from ds_dpo.watch.watchdog import Verdict, Watchdog


@dataclass
class Progress:
    """How far a run is; this and the engine's own state are all that a checkpoint holds."""

    step: int = 0
    pairs_seen: int = 0


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When things are due, in optimizer steps."""

    max_train_steps: int
    accumulation_steps: int
    pairs_per_step: int
    every: CadenceConfig

    def is_due(self, step: int, every: int | None) -> bool:
        """True at each multiple, and at the end of the run."""
        return every is not None and (step % every == 0 or step == self.max_train_steps)


class Trainer:
    """Knows when, not what: the objective is the step's, the numbers are the metrics'."""

    def __init__(
        self,
        *,
        engine: Engine,
        step: PreferenceStep,
        batches: Iterator[Any],
        bad_rows: Callable[[], Sequence[object]],
        encode: Callable[[Any], PreferenceBatch],
        cadence: Cadence,
        progress: Progress,
        store: CheckpointStore,
        saving: Saving,
        parts: Sequence[RunPart],
        watchdog: Watchdog | None,
        stop: StopRequest,
        hang: HangWatch,
        log: RunLog,
        writer: MetricsWriter | None,
        sample: Callable[[], Tensor] | None,
        save_samples: Callable[[Tensor, int], None],
        max_bad_rows: int,
    ) -> None:
        """Join the parts.

        batches: this rank's micro-batches as encode takes them, without end. bad_rows: the rows that it could not read
        so far. parts: what else follows the run and belongs to its checkpoints; the watchdog is one of them. writer:
        rank 0's, None elsewhere. sample: draws validation images (N, 3, X, Y), called by all ranks; save_samples:
        writes them and the step, on rank 0.
        """
        self._engine, self._step, self._encode = engine, step, encode
        self._batches, self._bad_rows, self._max_bad_rows = batches, bad_rows, max_bad_rows
        self._cadence, self._progress = cadence, progress
        self._store, self._saving = store, saving
        self._parts, self._watchdog, self._stop = parts, watchdog, stop
        self._hang, self._log, self._writer = hang, log, writer
        self._sample, self._save_samples = sample, save_samples

    def run(self) -> bool:
        """Train to max_train_steps; returns False where a request to stop came first. The last state is saved."""
        cadence = self._cadence
        stopped = False
        if self._progress.step == 0 and cadence.every.sample_every_steps is not None:
            self._draw_samples()  # what training starts from, to compare with
        for part in self._parts:
            part.begin(self._progress.step)
        self._hang.start()
        while self._progress.step < cadence.max_train_steps and not stopped:
            metrics, stopped = self._train_step()
            self._hang.beat()
            due = cadence.is_due(self._progress.step, cadence.every.log_every_steps)
            self._log.step(metrics, due=due or stopped)
            if self._writer is not None:
                self._writer.write(metrics)
            for error in (part.take_error() for part in self._parts):
                if error is not None:
                    with self._hang.pause("saving"):
                        self._save(is_last=True)
                    raise error
            verdict = None if self._watchdog is None else self._watchdog.take_verdict()
            if verdict is not None:
                with self._hang.pause("following the watchdog"):
                    is_followed = self._follow(verdict)
                if is_followed:
                    continue
            if stopped or self._saving.is_due(self._progress.step):
                try:
                    with self._hang.pause("saving"):
                        self._save(is_last=stopped or self._progress.step == cadence.max_train_steps)
                except CheckpointError:
                    if stopped and is_main():
                        self._stop.clear_file()  # it was followed: the start after this one is to go on
                    raise
            if not stopped and cadence.is_due(self._progress.step, cadence.every.sample_every_steps):
                with self._hang.pause("drawing validation images"):
                    self._draw_samples()
        if stopped:
            if is_main():
                self._stop.clear_file()
            self._log.line(f"stopped at step {self._progress.step} as asked; the same command goes on from there")
        return not stopped

    def _follow(self, verdict: Verdict) -> bool:
        """Stop, saved, with a CollapseError, or go back to the newest checkpoint before things went wrong.

        Returns False where there is none, so that the run goes on from where it is.
        """
        assert self._watchdog is not None
        if verdict.action == "stop":
            self._save(is_last=True)
            error = CollapseError(
                f"{verdict.sentence}; stopped at step {self._progress.step}, which is saved: the same command goes on "
                "from there; another run with a lower learning_rate or a higher beta would hold it"
            )
            raise said_once(error)
        self._saving.settle()
        if not self._store.set_aside_after(verdict.good_step):
            self._watchdog.lower_rate(f"{verdict.sentence}; no checkpoint is of step {verdict.good_step} or before: ")
            return False
        left = self._progress.step
        saved = self._store.load_newest()
        assert saved is not None, "one of the good step or before is there"
        self._progress.step = int(saved.client_state["step"])
        # pairs_seen goes on: the pairs that led astray are not met again at once
        states = saved.client_state["parts"]
        for part in self._parts:
            part.rewind(self._progress.step)
            if part is not self._watchdog and part.name in states:
                part.restore(states[part.name], saved.folder)
        if self._writer is not None:
            self._writer.rewind(self._progress.step)
        self._log.line(f"{verdict.sentence}; rolled back from step {left} to {saved.folder}")
        self._watchdog.after_roll_back(states.get(self._watchdog.name, {}))
        self._save(renews=True)  # with the lower rate and the pairs that it goes on with
        return True

    def _train_step(self) -> tuple[dict[str, float], bool]:
        """Do one optimizer step; returns its metrics, the same on all ranks, and whether any rank was asked to stop."""
        start, data_seconds = time.perf_counter(), 0.0
        learning_rate, skipped_before = self._engine.learning_rate, self._engine.skipped_steps
        sums = StepSums()
        reach("step.begin")
        for number in range(self._cadence.accumulation_steps):
            wait = time.perf_counter()
            samples = next(self._batches)
            data_seconds += time.perf_counter() - wait
            batch = self._encode(samples)
            output = self._step(batch)
            sums.add(output.pair_quantities)
            for part in self._parts:
                part.before_backward(batch.pair_ids, batch.timesteps, output.pair_quantities)
            self._engine.backward_and_step(output.loss)
            if number == 0:
                reach("step.backward")
        self._progress.step += 1
        self._progress.pairs_seen += self._cadence.pairs_per_step
        asked = self._stop.is_asked(look_for_file=is_main())
        own = {"asked": float(asked), "bad_rows": float(len(self._bad_rows())), **self._saving.counters()}
        means, totals = sums.reduce(counters=own)
        seconds = time.perf_counter() - start
        with self._hang.pause("completing a checkpoint"):
            self._saving.take(totals)
        self._require_readable_rows(int(totals["bad_rows"]))
        metrics = {"step": self._progress.step, **means}
        norm = self._engine.gradient_norm
        if norm is not None and self._engine.skipped_steps == skipped_before:
            metrics["gradient_norm"] = norm
        metrics |= {
            "learning_rate": learning_rate,
            "pairs_seen": self._progress.pairs_seen,
            "pairs_per_second": self._cadence.pairs_per_step / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "peak_memory_gib": peak_memory_gib(self._engine.device),
            "skipped_steps": self._engine.skipped_steps,
            "bad_rows": totals["bad_rows"],
            "failed_saves": self._saving.num_failed,
        }
        if self._engine.loss_scale is not None:
            metrics["loss_scale"] = self._engine.loss_scale
        with self._hang.pause("what follows a step"):
            for part in self._parts:
                metrics |= part.after_step(self._progress.step, metrics)
        return metrics, totals["asked"] > 0

    def _require_readable_rows(self, num_bad_rows: int) -> None:
        """Raise DataError on all ranks, naming the rows, once there are more unreadable ones than allowed."""
        if num_bad_rows <= self._max_bad_rows:
            return
        own_rows = "\n  ".join(str(row) for row in self._bad_rows())
        rows = "\n  ".join(part for part in gather_objects(own_rows) if part)
        error = DataError(
            f"{num_bad_rows} rows could not be read, and data.max_bad_rows allows {self._max_bad_rows}:\n  {rows}"
        )
        raise said_once(error)

    def _save(self, *, is_last: bool = False, renews: bool = False) -> None:
        """Save unless this step is saved already. is_last, renews: see Saving.save."""
        if self._watchdog is not None:
            self._saving.protect(self._watchdog.good_step)
        self._saving.save(
            self._contents,
            step=self._progress.step,
            is_last=is_last,
            renews=renews,
            first=self._flush_metrics,  # a checkpoint is never ahead of its metrics
        )

    def _flush_metrics(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _contents(self) -> Contents:
        return Contents(
            client_state={
                "step": self._progress.step,
                "pairs_seen": self._progress.pairs_seen,
                "parts": {part.name: part.state() for part in self._parts},
            },
            files=[file for part in self._parts for file in part.files()],
        )

    def _draw_samples(self) -> None:
        if self._sample is None:
            return
        self._engine.module.eval()
        images = self._sample()
        self._engine.module.train()
        if is_main():
            self._save_samples(images, self._progress.step)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, in GiB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
