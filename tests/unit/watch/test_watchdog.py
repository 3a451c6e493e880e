"""When the watchdog acts and what it leaves alone, on sequences of readings; those of two real runs among them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.watch.watchdog import Reading, Rule, Watchdog, WindowReadings

NAN = math.nan

# relative rise of the preferred images' error, every 20 steps: miniature, beta 500, rate 2e-4 falling
HEALTHY = (0.12, 0.15, 0.34, 0.48, 0.53, 0.55, 0.64, 0.70, 0.66, 1.03, 1.23, 1.18, 1.08, 1.09, 1.08)
# beta 200, rate 4e-4 held; and beta 100, rate 1e-3 held; held-out accuracy reads .94 to .97 meanwhile
COLLAPSING = (0.76, 0.76, 1.73, 2.06, 2.77, 8.74, 5.32, 4.63, 5.23, 9.84, 10.73, 7.49)
COLLAPSED_AT_ONCE = (4.68, 4.37, 27.44, 14.68, 18.94, 35.45, 24.10, 22.43)


def trips(rises: Any, *, max_rise: float, patience: int) -> list[int]:
    """Return at which readings (from 1) a rule trips, if the count starts anew each time."""
    rule, count, found = Rule(max_rise=max_rise, patience=patience), 0, []
    for number, rise in enumerate(rises, start=1):
        reading = rise if isinstance(rise, Reading) else Reading(rise=rise, low=0.9 * rise)
        count = rule.next_count(count, reading)
        if rule.trips(count):
            found.append(number)
            count = 0
    return found


@pytest.mark.parametrize(
    ("rises", "tripped"),
    [
        ((0, 0, 0, 0), []),
        ((0.3, 0.3, 0.3), [3]),
        ((0.3, 0.3, 0.1, 0.3, 0.3), []),  # the row was broken
        ((0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3), [3, 6]),
        ((0.21, 0.21, 0.21), []),  # the mean is above 0.2, its interval not
        ((-0.5, -0.5, -0.5), []),
        ((NAN, NAN, NAN), [3]),
        ((0.1, NAN, 0.3, 0.3), [4]),
    ],
)
def test_a_row_of_readings_whose_interval_is_above_trips(rises: tuple[float, ...], tripped: list[int]) -> None:
    assert trips(rises, max_rise=0.2, patience=3) == tripped


def test_what_comes_down_neither_counts_nor_ends_the_row() -> None:
    up, down = Reading(rise=1, low=0.9), Reading(rise=0.8, low=0.7, is_falling=True)
    assert trips([up, down, down, down, up], max_rise=0.2, patience=2) == [5]
    assert trips([up, down, down, down], max_rise=0.2, patience=2) == []


def test_the_miniatures_limit_tells_its_healthy_run_from_collapsing_ones() -> None:
    def first_trip(rises: tuple[float, ...]) -> int:
        pairs = zip((0.0, *rises), rises, strict=False)
        readings = [Reading(rise=now, low=0.85 * now, is_falling=now < 0.9 * before) for before, now in pairs]
        return next(iter(trips(readings, max_rise=2.0, patience=3)), 0)

    assert first_trip(HEALTHY) == 0
    assert first_trip(COLLAPSING) == 9  # step 180: those at 140 and 160 were on their way down
    assert first_trip(COLLAPSED_AT_ONCE) == 3


class Run:
    """A watchdog with what it asks of a run."""

    def __init__(self, action: Any, **settings: Any) -> None:
        self.scales: list[float] = []
        self.said: list[str] = []
        self.watchdog = Watchdog(
            Rule(max_rise=0.2, patience=2),
            action=action,
            rate_factor=0.5,
            max_interventions=settings.get("max_interventions", 2),
            read=lambda step, metrics: Reading(rise=metrics["rise"], low=metrics["rise"]) if step % 10 == 0 else None,
            scale_rate=self.scales.append,
            say=self.said.append,
        )

    def steps(self, first: int, *rises: float) -> list[Any]:
        found = []
        for number, rise in enumerate(rises):
            assert self.watchdog.after_step(first + 10 * number, {"rise": rise}) == {}
            found.append(self.watchdog.take_verdict())
        return found


def test_warning_changes_nothing() -> None:
    run = Run("warn")
    assert run.steps(10, 0.1, 0.3, 0.4) == [None] * 3
    assert run.scales == []
    assert run.said == [
        "watchdog, step 30: the error of preferred images is 40 % above the reference's, and has been above the "
        "limit of 20 % for 2 readings; lower the learning rate or raise beta"
    ]


def test_steps_without_a_reading_are_left_alone() -> None:
    run = Run("warn")
    for step in range(11, 19):
        run.watchdog.after_step(step, {})
    assert run.said == []


def test_rate_is_lowered_so_often_and_no_more() -> None:
    run = Run("lower_rate", max_interventions=2)
    run.steps(10, *[0.3] * 8)
    assert run.scales == [0.5, 0.5]
    assert "0.25 in all" in run.said[1]
    assert "max_interventions 2 is reached" in run.said[2]
    assert "is reached" in run.said[3]


@pytest.mark.parametrize("action", ["roll_back", "stop"])
def test_verdict_names_the_last_good_reading_and_is_given_once(action: str) -> None:
    run = Run(action)
    verdicts = run.steps(10, 0.0, 0.1, 0.3, 0.4)
    assert verdicts[:3] == [None] * 3
    assert (verdicts[3].action, verdicts[3].good_step) == (action, 20)
    assert run.watchdog.take_verdict() is None
    assert run.scales == []


def test_good_step_is_protected_only_where_it_may_be_gone_back_to() -> None:
    roll_back, lower = Run("roll_back"), Run("lower_rate")
    for run in (roll_back, lower):
        run.steps(10, 0.1, 0.3)
    assert (roll_back.watchdog.good_step, lower.watchdog.good_step) == (10, None)
    used_up = Run("roll_back", max_interventions=1)
    used_up.steps(10, 0.1, 0.3, 0.3)
    assert used_up.watchdog.good_step is None


def test_rolled_back_schedule_gets_all_lowerings_that_it_has_not_seen() -> None:
    run = Run("roll_back")
    saved = run.watchdog.state()  # rate 1
    run.steps(10, 0.3, 0.3)
    run.watchdog.after_roll_back(saved)
    assert math.prod(run.scales) == 0.5
    run.scales.clear()
    run.steps(30, 0.3, 0.3)
    run.watchdog.after_roll_back(saved)  # once more to the same checkpoint, with its rate of 1
    assert math.prod(run.scales) == 0.25


def test_resumed_watch_goes_on_with_its_row_and_its_number_of_interventions(tmp_path: Path) -> None:
    whole, first = Run("lower_rate", max_interventions=1), Run("lower_rate", max_interventions=1)
    whole.steps(10, 0.3, 0.3, 0.3, 0.3)
    first.steps(10, 0.3)
    second = Run("lower_rate", max_interventions=1)
    second.watchdog.restore(json.loads(json.dumps(first.watchdog.state())), tmp_path)
    second.steps(20, 0.3, 0.3, 0.3)
    assert second.said == whole.said
    assert second.watchdog.state() == whole.watchdog.state()


def test_windows_of_training_metrics_read_a_ratio_of_means() -> None:
    readings = WindowReadings(2)
    steps = [(0.1, 1.0), (0.5, 2.0), (0.1, 1.0), (0.1, 1.0), (0.3, 1.0), (0.3, 1.0)]
    found = [readings(0, {"chosen_difference": d, "reference_chosen_error": r}) for d, r in steps]
    assert found[0::2] == [None] * 3
    assert [reading.rise for reading in found[1::2] if reading] == pytest.approx([0.2, 0.1, 0.3])
    assert [reading.is_falling for reading in found[1::2] if reading] == [False, True, False]
