"""Keep and mark the best checkpoint of a run by a metric that its evaluations record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.distributed.collectives import broadcast_object, is_main
from ds_dpo.errors import CheckpointError
from ds_dpo.outside import parse_json
from ds_dpo.process.say import Say
from ds_dpo.storage import manifest
from ds_dpo.storage.best_mark import BEST_NAME, BestMark, read_best_mark, write_best_mark


@dataclass(frozen=True, kw_only=True)
class Readings:
    """A metric's values by step, and which way is better."""

    by_step: Mapping[int, float]
    higher_is_better: bool = True

    def up_to(self, step: int) -> Readings:
        """Return the readings of this step and before."""
        kept = {each: value for each, value in self.by_step.items() if each <= step}
        return Readings(by_step=kept, higher_is_better=self.higher_is_better)

    def best(self, steps: Sequence[int] | None = None) -> int | None:
        """Return the step of the best value, the earliest of equal ones, among the given steps; None without one."""
        known = sorted(step for step in self.by_step if steps is None or step in steps)
        sign = 1 if self.higher_is_better else -1
        return max(known, key=lambda step: sign * self.by_step[step], default=None)

    def fall(self, step: int) -> float:
        """Return how much worse the value of a step is than the best up to it; 0 if it is the best."""
        best = self.up_to(step).best()
        assert best is not None, "the step has a value"
        sign = 1 if self.higher_is_better else -1
        return sign * (self.by_step[best] - self.by_step[step])


def held_out_readings(path: Path, name: str, *, higher_is_better: bool) -> Readings:
    """Return the means of a quantity in held_out.jsonl; a line that cannot be read gives none."""
    found: dict[int, float] = {}
    for line in _lines(path):
        _add(found, line.get("step"), _item(line.get("overall"), name, 0))
    return Readings(by_step=found, higher_is_better=higher_is_better)


def validation_readings(path: Path, scorer: str) -> Readings:
    """Return the mean scores of a scorer in validation.jsonl; those of other prompts or another version are left out.

    The newest line decides which prompts and which version count.
    """
    found_lines = ((line, _item(line, "scorers", scorer)) for line in _lines(path))
    lines = [(line, of_scorer) for line, of_scorer in found_lines if isinstance(of_scorer, dict)]
    if not lines:
        return Readings(by_step={})
    newest, of_newest = lines[-1]
    found: dict[int, float] = {}
    for line, of_scorer in lines:
        if (line.get("prompts"), of_scorer.get("record")) == (newest.get("prompts"), of_newest.get("record")):
            _add(found, line.get("step"), of_scorer.get("mean"))
    return Readings(by_step=found, higher_is_better=bool(of_newest.get("higher_is_better", True)))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            fields = parse_json(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(fields, dict):
            yield fields


def _item(value: Any, *path: str | int) -> Any:
    for part in path:
        try:
            value = value[part]
        except (TypeError, KeyError, IndexError):
            return None
    return value


def _add(found: dict[int, float], step: Any, value: Any) -> None:
    """Add a value, unless it is none or of the untrained model, which no checkpoint holds."""
    if type(step) is int and step > 0 and type(value) in (int, float) and math.isfinite(value):
        found[step] = float(value)


class BestCheckpoint:
    """Knows from the run's records which step is the best, and marks the best checkpoint that exists.

    The records are the only memory: a resumed or rolled-back run cuts them, and this follows.
    """

    def __init__(
        self,
        folder: Path,
        metric: str,
        *,
        read: Callable[[], Readings],
        is_due: Callable[[int], bool],
        delay_steps: int,
        say: Say,
    ) -> None:
        """folder: of the checkpoints. metric: its name in messages. read: reads the record; rank 0 alone calls it.

        is_due: whether the metric is evaluated at a step. delay_steps: its value is known before the end of the step
        (0), or only in the next one (1).
        """
        self._folder, self.metric = folder, metric
        self._read, self.is_due, self._say = read, is_due, say
        self.delay_steps = delay_steps

    def readings(self) -> Readings:
        """Return the readings of rank 0's record; all ranks call it."""
        return broadcast_object(self._read() if is_main() else Readings(by_step={}))

    def is_new_best(self, step: int) -> bool:
        """Return on all ranks whether a step was just evaluated and is the best so far."""
        if not self.is_due(step):
            return False
        return self.readings().up_to(step).best() == step

    def mark(self, newest: int) -> int | None:
        """Mark the best complete checkpoint up to a step; rank 0 alone calls it. Returns its step, None without one.

        A mark that the disk refuses is named in the log and written with the next checkpoint.
        """
        complete = [
            manifest.step_of(folder) or 0
            for folder in manifest.checkpoint_folders(self._folder)
            if (folder / manifest.MANIFEST_NAME).is_file()
        ]
        readings = self._read().up_to(newest)
        best = readings.best(complete)
        if best is None:
            (self._folder / BEST_NAME).unlink(missing_ok=True)
            return None
        mark = BestMark(metric=self.metric, step=best, value=readings.by_step[best])
        if mark != self._marked():
            try:
                write_best_mark(self._folder, mark)
            except OSError as error:
                self._say(f"the best checkpoint, step {best}, cannot be marked: {error}; the next save tries again")
            else:
                self._say(f"the best checkpoint by {self.metric} is now that of step {best}: {mark.value:.4g}")
        return best

    def _marked(self) -> BestMark | None:
        try:
            return read_best_mark(self._folder)
        except CheckpointError:
            return None  # there is none, or one that a new one replaces
