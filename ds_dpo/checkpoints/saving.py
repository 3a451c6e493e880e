"""Decide when checkpoints are due; complete each one, or count it as failed and try again at the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ds_dpo.checkpoints.writer import CheckpointWriter, Contents, Saved
from ds_dpo.config.cadence import CadenceConfig
from ds_dpo.distributed.collectives import is_main
from ds_dpo.errors import CheckpointError
from ds_dpo.process.say import Say

_TRAINING_GOES_ON = "training continues, and the next save that is due tries again"


class Saving:
    """Saves as the cadence says. If a save fails, training continues with a loud message; the last save must succeed.

    All ranks call each method except abandon at the same step, and come to the same decision.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        *,
        every: CadenceConfig,
        max_train_steps: int,
        saved_step: int,
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """saved_step: step of the checkpoint that was loaded, or 0. clock: seconds; rank 0's clock decides."""
        self._writer, self._every, self._max_train_steps = writer, every, max_train_steps
        self._saved_step: int | None = saved_step or None
        self._say, self._clock = say, clock
        self._last_time = clock()
        self._is_time = False
        self._num_failed = 0

    @property
    def num_failed(self) -> int:
        """Number of failed saves since this start."""
        return self._num_failed

    def counters(self) -> dict[str, float]:
        """Return the numbers that take needs, to be summed over all ranks in the step's own reduction."""
        minutes = self._every.save_every_minutes
        is_time = is_main() and minutes is not None and self._clock() - self._last_time >= 60 * minutes
        return {"saving": float(self._writer.is_busy), "save_now": float(is_time)}

    def take(self, totals: Mapping[str, float]) -> None:
        """Complete the checkpoint in the background when no rank is still writing. totals: counters, over all ranks."""
        self._is_time = totals["save_now"] > 0
        if self._writer.is_in_flight and totals["saving"] == 0:
            self._finish()

    def is_due(self, step: int) -> bool:
        """Return whether to save now: at multiples of save and keep steps, after save_every_minutes, and at the end."""
        steps = (self._every.save_every_steps, self._every.keep_every_steps)
        return self._is_time or step == self._max_train_steps or any(every and step % every == 0 for every in steps)

    def saves_left(self, step: int) -> int:
        """Return the largest number of saves that can follow a step."""
        last = self._max_train_steps
        if self._every.save_every_minutes is not None or self._every.keep_best is not None:
            return last - step
        steps = (self._every.save_every_steps, self._every.keep_every_steps)
        return 1 + sum(last // every - step // every for every in steps if every)

    def protect(self, step: int | None) -> None:
        """See CheckpointWriter.protect."""
        self._writer.protect(step)

    def save(
        self,
        contents: Callable[[], Contents],
        *,
        step: int,
        is_last: bool = False,
        renews: bool = False,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Save a step, unless it is already saved; a save in flight is completed first.

        is_last: nothing is trained afterwards, so training waits, the save is tried twice, and a failure raises
        CheckpointError on all ranks. renews, first: see CheckpointWriter.begin.
        """
        if self._writer.is_busy:
            self._say(
                f"step {step} is due to be saved, but an earlier checkpoint is still being written: training waits"
            )
        self.settle()
        if self._saved_step == step and not renews:
            return
        in_background = self._every.save_in_background and not (is_last or renews)
        for is_last_try in (False, True) if is_last else (False,):
            self._last_time = self._clock()
            try:
                goes_on = self._writer.begin(
                    step=step, contents=contents(), in_background=in_background, renews=renews, first=first
                )
                self._saved_step = step
                if not goes_on:
                    self._say_saved(self._writer.finish())
                return
            except CheckpointError as error:
                if is_last_try:
                    raise
                self._fail(error, then="trying again" if is_last else _TRAINING_GOES_ON)

    def settle(self) -> None:
        """Complete the checkpoint in flight, if there is one, while training waits."""
        if self._writer.is_in_flight:
            self._finish()

    def abandon(self) -> None:
        """Give up the checkpoint in flight; each rank calls this by itself."""
        self._writer.abandon()

    def _finish(self) -> None:
        try:
            self._say_saved(self._writer.finish())
        except CheckpointError as error:
            self._fail(error, then=_TRAINING_GOES_ON)

    def _say_saved(self, saved: Saved) -> None:
        if saved.copied_seconds is None:
            self._say(f"saved {saved.folder} in {saved.written_seconds:.1f} s")
            return
        copied, written = f"copied in {saved.copied_seconds:.2f} s", f"written in {saved.written_seconds:.1f} s"
        self._say(f"saved {saved.folder}: {copied}, {written} in the background")

    def _fail(self, error: CheckpointError, *, then: str) -> None:
        self._num_failed += 1
        self._saved_step = None
        newest = self._writer.newest()
        kept = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is {newest}"
        self._say(f"SAVING FAILED, {kept}: {error}; {then}")
