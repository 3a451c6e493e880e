"""The watch over the metric of the best checkpoint: when it trips, and that a resumed run trips at the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_dpo.checkpoints.best import BestCheckpoint, Readings
from ds_dpo.watch.fall import FallWatch
from ds_dpo.watch.watchdog import Rule, Watchdog


def watch(by_step: dict[int, float], *, patience: int = 2, delay_steps: int = 0, higher: bool = True) -> FallWatch:
    best = BestCheckpoint(
        Path("unused"),
        "validation.bright",
        read=lambda: Readings(by_step=by_step, higher_is_better=higher),
        is_due=lambda step: step % 10 == 0,
        delay_steps=delay_steps,
        say=print,
    )
    return FallWatch(best, max_fall=0.1, patience=patience)


def trips(fall: FallWatch, steps: Any) -> list[tuple[int, int]]:
    return [(step, found.best_step) for step in steps if (found := fall.after_step(step)) is not None]


@pytest.mark.parametrize(
    ("values", "tripped"),
    [
        ((0.5, 0.6, 0.55, 0.52), []),
        ((0.5, 0.8, 0.6, 0.6, 0.6, 0.6), [(40, 20), (60, 20)]),
        ((0.8, 0.6, 0.75, 0.6, 0.6), [(50, 10)]),  # a row of two was broken
        ((0.8, 0.65, 0.9, 0.75, 0.75), [(50, 30)]),
    ],
)
def test_a_row_of_evaluations_far_below_the_best_trips(
    values: tuple[float, ...], tripped: list[tuple[int, int]]
) -> None:
    by_step = {10 * number: value for number, value in enumerate(values, start=1)}
    assert trips(watch(by_step), range(1, 61)) == tripped
    lower = {step: -value for step, value in by_step.items()}
    assert trips(watch(lower, higher=False), range(1, 61)) == tripped


def test_an_evaluation_that_comes_after_its_step_is_taken_in_the_next_one() -> None:
    assert trips(watch({10: 0.8, 20: 0.6}, patience=1, delay_steps=1), range(1, 25)) == [(21, 10)]


def test_an_evaluation_without_a_number_neither_counts_nor_ends_the_row() -> None:
    assert trips(watch({10: 0.8, 20: 0.6, 40: 0.6}), range(1, 50)) == [(40, 10)]


def test_later_evaluations_of_an_abandoned_stretch_do_not_count() -> None:
    by_step = {10: 0.8, 20: 0.6, 30: 0.9}
    assert trips(watch(by_step, patience=1), range(1, 25)) == [(20, 10)]


def test_a_resumed_watch_takes_each_evaluation_once() -> None:
    by_step = {10: 0.8, 20: 0.6, 30: 0.6, 40: 0.6}
    first = watch(by_step, delay_steps=1)
    assert trips(first, range(1, 21)) == []  # step 20 is saved before its images are scored
    second = watch(by_step, delay_steps=1)
    second.restore(first.state())
    assert trips(second, range(21, 45)) == [(31, 10)]
    second.rewind(10)
    assert trips(second, range(11, 45)) == [(31, 10)]


def watchdog(fall: FallWatch, action: Any, said: list[str], scales: list[float]) -> Watchdog:
    return Watchdog(
        Rule(max_rise=0.25, patience=1),
        action=action,
        rate_factor=0.5,
        max_interventions=1,
        read=lambda step, metrics: None,
        scale_rate=scales.append,
        say=said.append,
        fall=fall,
    )


def test_the_watchdog_acts_on_a_fall_and_a_roll_back_goes_to_the_best(tmp_path: Path) -> None:
    said: list[str] = []
    scales: list[float] = []
    dog = watchdog(watch({10: 0.8, 20: 0.6, 30: 0.5}), "roll_back", said, scales)
    for step in range(1, 31):
        dog.after_step(step, {})
    verdict = dog.take_verdict()
    assert verdict is not None
    assert (verdict.action, verdict.good_step) == ("roll_back", 10)
    assert verdict.sentence == (
        "watchdog, step 30: validation.bright is 0.5, which is worse than its best value, 0.8 at step 10, by more than "
        "0.1 for 2 evaluations"
    )
    lower = watchdog(watch({10: 0.8, 20: 0.6, 30: 0.5}), "lower_rate", said, scales)
    lower.restore(dog.state() | {"num_interventions": 0, "fall": {"count": 1, "taken": 20}}, tmp_path)
    lower.after_step(30, {})
    assert scales == [0.5]
    assert said[-1].startswith("watchdog, step 30: validation.bright is 0.5")
