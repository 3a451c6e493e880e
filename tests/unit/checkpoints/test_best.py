"""The best checkpoint by a recorded metric: read, kept, marked, and followed when the run goes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_run import Run, contents

from ds_dpo.checkpoints.best import BestCheckpoint, Readings, held_out_readings, validation_readings
from ds_dpo.errors import CheckpointError
from ds_dpo.storage.best_mark import BestMark, read_best_mark


def held_out(*lines: tuple[int, float | None]) -> str:
    return "".join(
        json.dumps({"step": step, "overall": {"accuracy": [value, 0, 1], "margin": [None, None, None]}}) + "\n"
        for step, value in lines
    )


def validation(step: int, mean: float | None, *, prompts: Any = ("a",), version: str = "1", higher: bool = True) -> str:
    found = {"mean": mean, "win_rate": 0.5, "higher_is_better": higher, "record": {"version": version}}
    return json.dumps({"step": step, "prompts": prompts, "scorers": {"bright": found}}) + "\n"


def test_readings_of_held_out_pairs_leave_out_the_start_torn_lines_and_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    assert held_out_readings(path, "accuracy", higher_is_better=True).by_step == {}
    path.write_text(held_out((0, 0.9), (10, 0.6), (20, None)) + "[1]\n" + held_out((30, 0.7)) + '{"step": 40, "over')
    assert held_out_readings(path, "accuracy", higher_is_better=True).by_step == {10: 0.6, 30: 0.7}
    assert held_out_readings(path, "margin", higher_is_better=True).by_step == {}


def test_validation_readings_are_of_the_newest_lines_prompts_and_version(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    path.write_text(
        validation(10, 5.0, prompts=("b",))
        + validation(20, 6.0, version="0")
        + validation(30, 2.0)
        + validation(40, None)
        + validation(50, 3.0, higher=False)
    )
    found = validation_readings(path, "bright")
    assert (found.by_step, found.higher_is_better) == ({30: 2.0, 50: 3.0}, False)
    assert validation_readings(path, "other").by_step == {}


def test_the_best_is_the_earliest_of_equal_ones_and_the_fall_is_from_it() -> None:
    readings = Readings(by_step={10: 0.5, 20: 0.7, 30: 0.7, 40: 0.6})
    assert readings.best() == 20
    assert readings.best([30, 40, 50]) == 30
    assert readings.best([50]) is None
    assert readings.up_to(10).best() == 10
    assert [readings.fall(step) for step in (10, 20, 40)] == pytest.approx([0, 0, 0.1])
    lower = Readings(by_step={10: 0.5, 20: 0.7, 30: 0.4}, higher_is_better=False)
    assert lower.best() == 30
    assert [lower.fall(step) for step in (20, 30)] == pytest.approx([0.2, 0])


class Best:
    """A run's folder with a best checkpoint by readings that a test sets."""

    def __init__(self, run: Run) -> None:
        self.run, self.by_step = run, {}  # type: ignore[var-annotated]
        self.best = BestCheckpoint(
            run.folder,
            "held_out.accuracy",
            read=lambda: Readings(by_step=self.by_step),
            is_due=lambda step: step % 10 == 0,
            delay_steps=0,
            say=run.said.append,
        )

    def save(self, step: int, value: float | None = None) -> None:
        """Evaluate a step, and save it."""
        if value is not None:
            self.by_step[step] = value
        self.run.writer(keep=1, best=self.best).save(step=step, contents=contents(step))

    def steps(self) -> list[int]:
        return [int(name.removeprefix("step_")) for name in self.run.names() if name.startswith("step_")]


def test_the_best_stays_beside_the_newest_until_a_better_one_is_complete(run: Run) -> None:
    best = Best(run)
    best.save(5)
    assert (best.steps(), run.said) == ([5], [])  # nothing is evaluated, nothing is marked
    best.save(10, 0.6)
    best.save(20, 0.5)
    best.save(25)
    assert best.steps() == [10, 25]
    assert read_best_mark(run.folder) == BestMark(metric="held_out.accuracy", step=10, value=0.6)
    assert json.loads((run.folder / "best.json").read_text())["checkpoint"] == "step_00000010"
    best.save(30, 0.7)
    assert best.steps() == [30]
    assert read_best_mark(run.folder).step == 30
    assert run.said == [
        "the best checkpoint by held_out.accuracy is now that of step 10: 0.6",
        "the best checkpoint by held_out.accuracy is now that of step 30: 0.7",
    ]


def test_a_step_is_a_new_best_only_if_it_was_evaluated_and_is_better_than_all_before(run: Run) -> None:
    best = Best(run)
    best.by_step = {10: 0.6, 20: 0.6, 30: 0.7}
    assert [best.best.is_new_best(step) for step in (10, 15, 20, 30, 40)] == [True, False, False, True, False]


def test_a_better_step_that_could_not_be_saved_is_not_marked(run: Run) -> None:
    best = Best(run)
    best.save(10, 0.6)
    best.by_step[20] = 0.9
    best.save(30, 0.5)
    assert (best.steps(), read_best_mark(run.folder).step) == ([10, 30], 10)


def test_the_mark_follows_a_run_that_goes_back_behind_it(run: Run) -> None:
    best = Best(run)
    best.save(10, 0.6)
    best.save(20, 0.7)
    run.store().set_aside_after(10)
    best.best.mark(10)
    assert not (run.folder / "best.json").exists()  # step 10 was deleted for step 20
    best.save(20, 0.1)
    assert read_best_mark(run.folder).value == 0.1


def test_a_mark_that_the_disk_refuses_is_said_and_the_checkpoint_stays(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoints: Path, mark: BestMark) -> None:
        raise OSError(28, "No space left on device")

    best = Best(run)
    monkeypatch.setattr("ds_dpo.checkpoints.best.write_best_mark", refuse)
    best.save(10, 0.6)
    best.save(20, 0.5)
    assert best.steps() == [10, 20]
    assert "the best checkpoint, step 10, cannot be marked: [Errno 28]" in run.said[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"metric": "m", "step": "../x", "value": 1}', '{"metric": "m", "step": true, "value": 1}']
)
def test_a_damaged_mark_is_one_error_and_the_next_save_replaces_it(text: str, run: Run) -> None:
    best = Best(run)
    best.save(10, 0.6)
    (run.folder / "best.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"best\.json: does not name a checkpoint"):
        read_best_mark(run.folder)
    best.save(20, 0.5)
    assert read_best_mark(run.folder).step == 10


def test_a_run_without_a_mark_says_how_to_get_one(run: Run) -> None:
    run.save(10)
    with pytest.raises(CheckpointError, match=r"marks no best checkpoint.*cadence\.keep_best"):
        read_best_mark(run.folder)
