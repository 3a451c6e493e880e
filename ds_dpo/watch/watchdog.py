"""A watch over the known collapse of preference training: the preferred images' error runs away from the reference's.

A margin can grow while both images get worse, and Diffusion-DPO asks for no more; a little of that is in every run.
What tells a collapse is how far the preferred images' error stands above the reference's. Sources of the complaint:
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

Action = Literal["warn", "lower_rate", "roll_back", "stop"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where the preferred images' error stands: policy error over reference error, minus 1; 0 at the start.

    rise: the mean. low: the lower end of its 95 % interval; the mean where there is none. is_falling: it has come down
    since the reading before, beyond the interval of that change.
    """

    rise: float
    low: float
    is_falling: bool = False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Trips after `patience` readings in a row whose interval lies above max_rise.

    A reading on its way down neither counts nor ends the row: what recovers is left alone. One that is not finite
    counts as far above.
    """

    max_rise: float
    patience: int

    def is_above(self, reading: Reading) -> bool:
        return not reading.low <= self.max_rise  # NaN is above

    def next_count(self, count: int, reading: Reading) -> int:
        """Return how many readings of the row count, this one included."""
        if not self.is_above(reading):
            return 0
        return count if reading.is_falling else count + 1

    def trips(self, count: int) -> bool:
        return count >= self.patience


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """That the rule has tripped. good_step: of the newest reading before the row, where a roll-back may go to."""

    action: Action
    good_step: int
    sentence: str


class Watchdog(RunPart):
    """Takes readings, and says when and how to act; at most max_interventions times, after that it only warns."""

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
    ) -> None:
        """Join the parts. read: gives a reading where a step has one. scale_rate: multiplies the rate for good."""
        self._rule, self._action, self._rate_factor = rule, action, rate_factor
        self._max_interventions = max_interventions
        self._read, self._scale_rate, self._say = read, scale_rate, say
        self._count = 0
        self._good_step = 0
        self._num_interventions = 0
        self._rate_scale = 1.0
        self._verdict: Verdict | None = None

    @property
    def good_step(self) -> int | None:
        """The step that a roll-back would go to, or before; None where there will be none."""
        has_one_left = self._num_interventions < self._max_interventions
        return self._good_step if self._action == "roll_back" and has_one_left else None

    def take_verdict(self) -> Verdict | None:
        """Return what the last step led to, once."""
        verdict, self._verdict = self._verdict, None
        return verdict

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Take a reading where there is one; warns and lowers the rate itself, the rest is a verdict."""
        reading = self._read(step, metrics)
        if reading is None:
            return {}
        self._count = self._rule.next_count(self._count, reading)
        if not self._rule.is_above(reading):
            self._good_step = step
        if self._rule.trips(self._count):
            self._act(step, reading)
        return {}

    def _act(self, step: int, reading: Reading) -> None:
        self._count = 0  # what was done gets as long to work
        rise = f"{100 * reading.rise:.0f} %" if math.isfinite(reading.rise) else "not finite"
        sentence = (
            f"watchdog, step {step}: the error of preferred images stands {rise} above the reference's, for "
            f"{self._rule.patience} readings above the limit of {100 * self._rule.max_rise:.0f} %"
        )
        if self._action == "warn":
            self._say(f"{sentence}; a lower learning rate or a higher beta would hold it")
            return
        if self._num_interventions >= self._max_interventions:
            self._say(f"{sentence}; watchdog.max_interventions {self._max_interventions} are used up")
            return
        self._num_interventions += 1
        if self._action == "lower_rate":
            self.lower_rate(f"{sentence}; ")
            return
        self._verdict = Verdict(action=self._action, good_step=self._good_step, sentence=sentence)

    def lower_rate(self, sentence: str) -> None:
        """Multiply the learning rate by rate_factor for good, whatever the schedule goes on to do."""
        self._rate_scale *= self._rate_factor
        self._scale_rate(self._rate_factor)
        self._say(f"{sentence}the learning rate is multiplied by {self._rate_factor:g} ({self._rate_scale:g} in all)")

    def after_roll_back(self, saved: Mapping[str, Any]) -> None:
        """Lower the rate of the state that was gone back to. saved: this part's state in that checkpoint."""
        # the schedule came back with the rate of that time
        self._scale_rate(self._rate_scale / float(saved.get("rate_scale", 1.0)))
        self.lower_rate("after the roll-back ")

    def state(self) -> dict[str, Any]:
        """Return the row so far, and what was done; the scaled rate itself is in the schedule's own state."""
        return {
            "count": self._count,
            "good_step": self._good_step,
            "num_interventions": self._num_interventions,
            "rate_scale": self._rate_scale,
        }

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self._count, self._good_step = int(state["count"]), int(state["good_step"])
        self._num_interventions, self._rate_scale = int(state["num_interventions"]), float(state["rate_scale"])


class WindowReadings:
    """Readings from the metrics of training steps, where no held-out pairs give them: means over windows of steps."""

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
        # other pairs and timesteps in each window: a tenth is taken to be chance
        is_falling = self._rise_before is not None and rise < 0.9 * self._rise_before
        self._sums, self._num_steps, self._rise_before = [0.0, 0.0], 0, rise
        return Reading(rise=rise, low=rise, is_falling=is_falling)
