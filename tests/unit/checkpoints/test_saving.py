"""When checkpoints are due, and what a refusing disk leads to; a fake writer says yes or no."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from ds_dpo.checkpoints.saving import Saving
from ds_dpo.checkpoints.writer import CheckpointWriter, Contents, Saved
from ds_dpo.config.cadence import CadenceConfig
from ds_dpo.errors import CheckpointError


class FakeWriter:
    """Its files are written once `is_busy` is set back. refusals: how many saves fail, and where."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_in_flight = self.is_busy = False
        self.has_memory = True
        self.refusals: list[str] = []
        self.folder = Path("step")

    def begin(
        self, *, step: int, contents: Contents, in_background: bool, renews: bool, first: Callable[[], None]
    ) -> bool:
        in_background = in_background and self.has_memory
        self.calls.append(f"begin {step}{' in background' * in_background}{' renews' * renews}")
        self.refuse("begin")
        self.folder = Path(f"step_{step}")
        self.is_in_flight, self.is_busy = True, in_background
        self.in_background = in_background
        return in_background

    def finish(self) -> Saved:
        self.calls.append("finish")
        self.is_in_flight = self.is_busy = False
        self.refuse("finish")
        return Saved(folder=self.folder, copied_seconds=0.25 if self.in_background else None, written_seconds=8.0)

    def refuse(self, where: str) -> None:
        if self.refusals[:1] == [where]:
            del self.refusals[0]
            raise CheckpointError("No space left on device")

    def newest(self) -> Path:
        return Path("checkpoints/step_00000001")


class Run:
    def __init__(self, *, last: int = 100, saved_step: int = 0, **every: Any) -> None:
        self.writer, self.said, self.seconds = FakeWriter(), [], 0.0
        self.saving = Saving(
            cast(CheckpointWriter, self.writer),
            every=CadenceConfig(**every),
            max_train_steps=last,
            saved_step=saved_step,
            say=self.said.append,
            clock=lambda: self.seconds,
        )

    def step(self, step: int, *, is_last: bool = False) -> None:
        """What the trainer does at the end of a step, alone on its rank."""
        self.saving.take(self.saving.counters())
        if self.saving.is_due(step) or is_last:
            self.saving.save(lambda: Contents(client_state={}), step=step, is_last=is_last)


def test_due_at_multiples_of_either_number_at_the_end_and_not_between() -> None:
    saving = Run(last=13, save_every_steps=4, keep_every_steps=6).saving
    assert [step for step in range(1, 14) if saving.is_due(step)] == [4, 6, 8, 12, 13]
    assert saving.saves_left(6) >= 3


def test_due_when_the_time_has_come_counted_from_the_last_save_of_any_kind() -> None:
    run = Run(save_every_steps=10, save_every_minutes=1, save_in_background=False)
    for step in range(1, 16):
        run.seconds = 14.0 * step
        run.step(step)
    # 70 s at step 5; 140 s is step 10 (63 s later); 210 s at step 15
    assert [call for call in run.writer.calls if call != "finish"] == ["begin 5", "begin 10", "begin 15"]


def test_completed_at_the_step_at_which_no_rank_writes_any_more() -> None:
    run = Run(save_every_steps=2)
    run.step(2)
    run.step(3)
    assert run.writer.calls == ["begin 2 in background"]
    run.writer.is_busy = False  # this rank's thread is done; another rank's is not
    run.saving.take({"saving": 1.0, "save_now": 0.0})
    assert run.writer.calls == ["begin 2 in background"]
    run.saving.take({"saving": 0.0, "save_now": 0.0})
    assert run.writer.calls == ["begin 2 in background", "finish"]
    assert run.said == ["saved step_2: copied in 0.25 s, written in 8.0 s in the background"]


def test_a_save_that_is_due_meanwhile_waits_and_says_so() -> None:
    run = Run(save_every_steps=2)
    run.step(2)
    run.step(4)
    assert run.writer.calls == ["begin 2 in background", "finish", "begin 4 in background"]
    assert "step 4 is due to be saved, but an earlier checkpoint is still being written" in run.said[0]


def test_the_last_one_waits_for_the_one_in_flight_and_is_in_the_foreground() -> None:
    run = Run(save_every_steps=2)
    run.step(2)
    run.step(3, is_last=True)
    assert run.writer.calls == ["begin 2 in background", "finish", "begin 3", "finish"]
    assert run.said[-1] == "saved step_3 in 8.0 s"


def test_without_memory_it_is_completed_at_once() -> None:
    run = Run(save_every_steps=2)
    run.writer.has_memory = False
    run.step(2)
    assert run.writer.calls == ["begin 2", "finish"]


@pytest.mark.parametrize("where", ["begin", "finish"])
def test_a_refusing_disk_is_shouted_counted_and_tried_at_the_next_that_is_due(where: str) -> None:
    run = Run(save_every_steps=2)
    run.writer.refusals = [where]
    run.step(2)
    run.saving.settle()
    assert run.saving.num_failed == 1
    assert "SAVING FAILED, the last good checkpoint is checkpoints/step_00000001: No space left" in run.said[-1]
    run.step(3)
    run.step(4)
    run.saving.settle()
    assert run.writer.calls[-2:] == ["begin 4 in background", "finish"]
    assert run.saving.num_failed == 1


def test_the_last_one_is_tried_twice() -> None:
    run = Run(last=3)
    run.writer.refusals = ["finish"]
    run.step(3, is_last=True)
    assert run.writer.calls == ["begin 3", "finish", "begin 3", "finish"]
    assert run.said[-1] == "saved step_3 in 8.0 s"
    run = Run(last=3)
    run.writer.refusals = ["finish", "begin"]
    with pytest.raises(CheckpointError, match="No space"):
        run.step(3, is_last=True)


def test_a_failed_one_in_flight_of_the_same_step_is_saved_again_at_a_stop() -> None:
    run = Run(save_every_steps=2)
    run.writer.refusals = ["finish"]
    run.step(2)
    run.saving.save(lambda: Contents(client_state={}), step=2, is_last=True)
    assert run.writer.calls == ["begin 2 in background", "finish", "begin 2", "finish"]


def test_a_saved_step_is_not_saved_again_but_where_it_is_renewed() -> None:
    run = Run(saved_step=7)
    run.step(7, is_last=True)
    assert run.writer.calls == []
    run.saving.save(lambda: Contents(client_state={}), step=7, renews=True)
    assert run.writer.calls == ["begin 7 renews", "finish"]
