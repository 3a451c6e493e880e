"""Detect the known collapse of preference training: the error of preferred images rises far above the reference's.

The margin can grow while both images get worse, and Diffusion-DPO's loss allows that; every run has a little of it. A
large rise of the preferred images' error above the reference's shows a collapse. Reported in
SalesforceAIResearch/DiffusionDPO, issues 1 and 17.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_dpo.process.say import Say
from ds_dpo.run_part import RunPart
from ds_dpo.watch.fall import FallWatch

Action = Literal["warn", "lower_rate", "roll_back", "stop"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The rise of the preferred images' error: policy error over reference error, minus 1; 0 at the start.

    rise: the mean. low: the lower end of its 95 % interval, or the mean if there is no interval. is_falling: it has
    fallen since the previous reading by more than the interval of that change.
    """

    rise: float
    low: float
    is_falling: bool = False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Trips after `patience` readings in a row whose interval is above max_rise.

    A falling reading neither counts nor ends the row, because a run that recovers needs no action. A reading that is
    not finite counts as above.
    """

    max_rise: float
    patience: int

    def is_above(self, reading: Reading) -> bool:
        return not reading.low <= self.max_rise  # NaN is above

    def next_count(self, count: int, reading: Reading) -> int:
        """Return the number of readings in the row, this one included."""
        if not self.is_above(reading):
            return 0
        return count if reading.is_falling else count + 1

    def trips(self, count: int) -> bool:
        return count >= self.patience


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A tripped rule. good_step: step of the newest reading before the row, to which a roll-back may go."""

    action: Action
    good_step: int
    sentence: str


class Watchdog(RunPart):
    """Takes readings and decides when to act; after max_interventions actions it only warns."""

    name = "watchdog"

    def __init__(
        self,
        rule: Rule,
        *,
        action: Action,
        rate_factor: float,
        max_interventions: int,
        read: Callable[[int, Mapping[str, float]], Reading | None],
        scale_rate: Callable[[float], None],
        say: Say,
        fall: FallWatch | None = None,
    ) -> None:
        """Join the parts. read: returns a step's reading or None. scale_rate: multiplies the rate permanently.

        fall: also watches the metric of the best checkpoint.
        """
        self._rule, self._action, self._rate_factor = rule, action, rate_factor
        self._max_interventions = max_interventions
        self._read, self._scale_rate, self._say, self._fall = read, scale_rate, say, fall
        self._count = 0
        self._good_step = 0
        self._num_interventions = 0
        self._rate_scale = 1.0
        self._verdict: Verdict | None = None

    @property
    def good_step(self) -> int | None:
        """The latest step to which a roll-back may go; None if there will be no roll-back."""
        has_one_left = self._num_interventions < self._max_interventions
        return self._good_step if self._action == "roll_back" and has_one_left else None

    def take_verdict(self) -> Verdict | None:
        """Return the verdict of the last step, once."""
        verdict, self._verdict = self._verdict, None
        return verdict

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Take the step's reading, if it has one. Warns and lowers the rate itself; other actions become a verdict."""
        reading = self._read(step, metrics)
        fall = None if self._fall is None else self._fall.after_step(step)
        if reading is not None and self._counts_to_the_limit(step, reading):
            self._act(self._describe(step, reading), good_step=self._good_step)
        elif fall is not None:
            self._act(fall.sentence, good_step=fall.best_step)
        return {}

    def _counts_to_the_limit(self, step: int, reading: Reading) -> bool:
        self._count = self._rule.next_count(self._count, reading)
        if not self._rule.is_above(reading):
            self._good_step = step
        return self._rule.trips(self._count)

    def _describe(self, step: int, reading: Reading) -> str:
        rise = f"{100 * reading.rise:.0f} %" if math.isfinite(reading.rise) else "not finite"
        patience = self._rule.patience
        readings = "1 reading" if patience == 1 else f"{patience} readings"
        return (
            f"watchdog, step {step}: the error of preferred images is {rise} above the reference's, and has been above "
            f"the limit of {100 * self._rule.max_rise:.0f} % for {readings}"
        )

    def _act(self, sentence: str, *, good_step: int) -> None:
        self._count = 0  # the action gets the same number of readings to work
        if self._action == "warn":
            self._say(f"{sentence}; lower the learning rate or raise beta")
            return
        if self._num_interventions >= self._max_interventions:
            self._say(
                f"{sentence}; watchdog.max_interventions {self._max_interventions} is reached, so nothing is done"
            )
            return
        self._num_interventions += 1
        if self._action == "lower_rate":
            self.lower_rate(f"{sentence}; ")
            return
        self._verdict = Verdict(action=self._action, good_step=good_step, sentence=sentence)

    def lower_rate(self, sentence: str) -> None:
        """Multiply the learning rate, and the rest of its schedule, by rate_factor."""
        self._rate_scale *= self._rate_factor
        self._scale_rate(self._rate_factor)
        self._say(f"{sentence}the learning rate is multiplied by {self._rate_factor:g} ({self._rate_scale:g} in all)")

    def after_roll_back(self, saved: Mapping[str, Any]) -> None:
        """Lower the rate after a roll-back. saved: this part's state in the checkpoint that was loaded."""
        # the checkpoint restored the schedule with the rate of that time
        self._scale_rate(self._rate_scale / float(saved.get("rate_scale", 1.0)))
        self.lower_rate("after the roll-back ")

    def state(self) -> dict[str, Any]:
        """Return the row so far and the actions; the scaled rate itself is in the schedule's state."""
        return {
            "count": self._count,
            "good_step": self._good_step,
            "num_interventions": self._num_interventions,
            "rate_scale": self._rate_scale,
            **({} if self._fall is None else {"fall": self._fall.state()}),
        }

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self._count, self._good_step = int(state["count"]), int(state["good_step"])
        self._num_interventions, self._rate_scale = int(state["num_interventions"]), float(state["rate_scale"])
        if self._fall is not None and "fall" in state:
            self._fall.restore(state["fall"])

    def rewind(self, step: int) -> None:
        """Forget readings of later steps."""
        self._good_step = min(self._good_step, step)
        if self._fall is not None:
            self._fall.rewind(step)


class WindowReadings:
    """Readings from the metrics of training steps, for runs without held-out pairs: means over windows of steps."""

    def __init__(self, window_steps: int) -> None:
        self._window_steps = window_steps
        self._sums = [0.0, 0.0]
        self._num_steps = 0
        self._rise_before: float | None = None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> Reading | None:
        """Return a reading at the end of each window; a resumed run starts a new one."""
        for place, name in enumerate(("chosen_difference", "reference_chosen_error")):
            self._sums[place] += metrics[name]
        self._num_steps += 1
        if self._num_steps < self._window_steps:
            return None
        rise = self._sums[0] / self._sums[1]
        # each window has other pairs and timesteps: a tenth counts as chance
        is_falling = self._rise_before is not None and rise < 0.9 * self._rise_before
        self._sums, self._num_steps, self._rise_before = [0.0, 0.0], 0, rise
        return Reading(rise=rise, low=rise, is_falling=is_falling)
