"""The loop on one rank, with fakes for all that it works with: what it does, in which order, and how it ends."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_dpo.checkpoints.store import LoadedCheckpoint
from ds_dpo.config.cadence import CadenceConfig
from ds_dpo.errors import CheckpointError, CollapseError, DataError, NonFiniteError
from ds_dpo.run_part import RunPart
from ds_dpo.training.micro_batches import MicroBatches
from ds_dpo.training.optimizer_step import OptimizerStep
from ds_dpo.training.run_parts import RunParts
from ds_dpo.training.trainer import Cadence, Progress, RunCheckpoints, Trainer
from ds_dpo.watch.watchdog import Verdict

ACCUMULATION_STEPS, PAIRS_PER_STEP = 2, 6


class FakeEngine:
    """Counts what reaches it. skips: numbers of optimizer steps (from 1) whose update is left out."""

    device, loss_scale, gradient_norm = torch.device("cpu"), None, 0.5

    def __init__(self, events: list[str], skips: set[int]) -> None:
        self.events, self.skips = events, skips
        self.learning_rate, self.skipped_steps, self.num_micro_batches = 1.0, 0, 0

    def backward_and_step(self, loss: float) -> None:
        self.num_micro_batches += 1
        self.events.append(f"backward {loss:g}")
        if self.num_micro_batches % ACCUMULATION_STEPS == 0:
            self.learning_rate /= 2  # the schedule moves on
            self.skipped_steps += self.num_micro_batches // ACCUMULATION_STEPS in self.skips


class FakeSaving:
    num_failed = 0

    def __init__(self, events: list[str], every: int) -> None:
        self.events, self.every, self.refuses = events, every, False
        self.contents: list[Any] = []

    def counters(self) -> dict[str, float]:
        return {"saving": 0.0, "save_now": 0.0}

    def take(self, totals: Any) -> None:
        self.events.append("take")

    def is_due(self, step: int) -> bool:
        return step % self.every == 0

    def protect(self, step: int | None) -> None:
        self.events.append(f"protect {step}")

    def settle(self) -> None:
        self.events.append("settle")

    def save(self, contents: Any, *, step: int, is_last: bool, renews: bool, first: Any) -> None:
        first()
        self.events.append(f"save {step}{' last' * is_last}{' renews' * renews}")
        if self.refuses:
            raise CheckpointError("No space left on device")
        self.contents.append(contents())


class FakeStore:
    def __init__(self, events: list[str]) -> None:
        self.events, self.saved = events, None

    def set_aside_after(self, step: int) -> bool:
        self.events.append(f"set aside after {step}")
        return self.saved is not None

    def load_newest(self) -> LoadedCheckpoint | None:
        return self.saved


class Part(RunPart):
    """Notes what it sees. error_at: the step after which it asks for an end."""

    name = "part"

    def __init__(self, events: list[str]) -> None:
        self.events, self.error_at, self.seen = events, 0, []

    def begin(self, step: int) -> None:
        self.events.append(f"begin {step}")

    def before_backward(self, pair_ids: Any, timesteps: Any, pair_quantities: Any) -> None:
        self.events.append("before backward")

    def after_step(self, step: int, metrics: Any) -> dict[str, float]:
        self.step = step
        self.seen.append(dict(metrics))
        return {"beta": 10.0 * step}

    def take_error(self) -> NonFiniteError | None:
        return NonFiniteError("too many") if self.step == self.error_at else None

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: Any, folder: Path) -> None:
        self.events.append(f"restore {state} of {folder}")

    def rewind(self, step: int) -> None:
        self.events.append(f"rewind {step}")


class FakeWatchdog(RunPart):
    name, good_step = "watchdog", 1

    def __init__(self, events: list[str], verdicts: dict[int, Verdict]) -> None:
        self.events, self.verdicts, self.step = events, verdicts, 0

    def after_step(self, step: int, metrics: Any) -> dict[str, float]:
        self.step = step
        return {}

    def take_verdict(self) -> Verdict | None:
        return self.verdicts.pop(self.step, None)

    def lower_rate(self, why: str) -> None:
        self.events.append(f"lower rate: {why}")

    def after_roll_back(self, saved: Any) -> None:
        self.events.append(f"after roll-back {saved}")

    def rewind(self, step: int) -> None:
        self.events.append(f"watchdog rewinds {step}")


class Run:
    """A trainer among fakes. asked_at: the step in which a request to stop is found. bad_rows: found in each step."""

    def __init__(
        self,
        *,
        steps: int = 3,
        begun: int = 0,
        save_every: int = 100,
        sample_every: int | None = None,
        asked_at: int = 0,
        bad_rows: int = 0,
        max_bad_rows: int = 0,
        skips: set[int] = frozenset(),  # type: ignore[assignment]
        verdicts: dict[int, Verdict] | None = None,
        missing: tuple[int, ...] = (),
        best: dict[int, float] | None = None,
    ) -> None:
        self.events: list[str] = []
        self.lines: list[str] = []
        self.metrics: list[tuple[dict[str, float], bool]] = []
        self.bad_rows: list[str] = []
        self.engine = FakeEngine(self.events, skips)
        self.saving, self.store = FakeSaving(self.events, save_every), FakeStore(self.events)
        self.part = Part(self.events)
        self.progress = Progress(step=begun, pairs_seen=begun * PAIRS_PER_STEP)
        watchdog: Any = None if verdicts is None else FakeWatchdog(self.events, verdicts)
        self.trainer = Trainer(
            optimizer_step=OptimizerStep(
                engine=self.engine,  # type: ignore[arg-type]
                preference_step=self._loss_of,  # type: ignore[arg-type]
                micro_batches=MicroBatches(
                    samples=self._samples(bad_rows), encode=self._batch, bad_rows=lambda: self.bad_rows
                ),
                accumulation_steps=ACCUMULATION_STEPS,
            ),
            progress=self.progress,
            cadence=Cadence(
                max_train_steps=steps,
                pairs_per_step=PAIRS_PER_STEP,
                every=CadenceConfig(log_every_steps=2, sample_every_steps=sample_every),
            ),
            parts=RunParts([self.part], watchdog=watchdog),
            checkpoints=RunCheckpoints(store=self.store, saving=self.saving, best=self._best(best)),  # type: ignore[arg-type]
            record=SimpleNamespace(  # type: ignore[arg-type]
                line=self.lines.append,
                step=lambda metrics, due: self.metrics.append((metrics, due)),
                flush=lambda: self.events.append("flush"),
                rewind=lambda step: self.events.append(f"record rewinds {step}"),
            ),
            supervision=SimpleNamespace(  # type: ignore[arg-type]
                stop=SimpleNamespace(
                    is_asked=lambda look_for_file: self.progress.step == asked_at - 1,
                    clear_file=lambda: self.events.append("clear STOP"),
                ),
                hang=SimpleNamespace(
                    start=lambda: self.events.append("hang starts"),
                    beat=lambda: self.events.append("beat"),
                    end_step=lambda: self.events.append("end step"),
                    pause=self._pause,
                ),
            ),
            drawing=None
            if sample_every is None
            else SimpleNamespace(  # type: ignore[arg-type]
                draw=lambda step: self.events.append(f"draw {step}"), is_missing=lambda step: step in missing
            ),
            max_bad_rows=max_bad_rows,
        )

    def _best(self, values: dict[int, float] | None) -> Any:
        if values is None:
            return None
        return SimpleNamespace(
            is_new_best=lambda step: step in values and values[step] == max(values[s] for s in values if s <= step),
            mark=lambda step: self.events.append(f"mark {step}"),
        )

    @contextmanager
    def _pause(self, what: str) -> Any:
        yield

    def _samples(self, bad_rows: int) -> Any:
        number = 0
        while True:
            if number % ACCUMULATION_STEPS == 0:
                self.bad_rows += [f"row {len(self.bad_rows)}" for _ in range(bad_rows)]
            number += 1
            yield number

    def _batch(self, number: int) -> Any:
        return SimpleNamespace(number=number, pair_ids=None, timesteps=None)

    def _loss_of(self, batch: Any) -> Any:
        # losses n and n + 2 of the n-th micro-batch's two pairs
        pair_losses = torch.tensor([batch.number, batch.number + 2.0])
        return SimpleNamespace(loss=float(batch.number), pair_quantities={"loss": pair_losses})


def test_a_step_takes_its_micro_batches_in_order_and_the_run_goes_to_its_end() -> None:
    run = Run(steps=2)
    assert run.trainer.run()
    expected = ["begin 0", "hang starts"]
    for first, second in ((1, 2), (3, 4)):
        # a beat for each micro-batch: the hang watch judges them, not steps
        expected += ["before backward", f"backward {first}", "beat", "before backward", f"backward {second}", "beat"]
        expected += ["take", "end step"]
    assert run.events == expected
    assert (run.progress.step, run.progress.pairs_seen) == (2, 12)


def test_metrics_are_means_over_the_step_and_the_rate_that_its_update_used() -> None:
    run = Run(steps=3, skips={2})
    run.trainer.run()
    found = [metrics for metrics, _ in run.metrics]
    # losses 1, 3, 2, 4 in the first step; 3, 5, 4, 6 in the second; 5, 7, 6, 8 in the third
    assert [metrics["loss"] for metrics in found] == [2.5, 4.5, 6.5]
    assert [metrics["learning_rate"] for metrics in found] == [1.0, 0.5, 0.25]
    assert [metrics["pairs_seen"] for metrics in found] == [6, 12, 18]
    assert [metrics["beta"] for metrics in found] == [10.0, 20.0, 30.0]  # of a part
    assert ["gradient_norm" in metrics for metrics in found] == [True, False, True]  # the second update was skipped
    assert [metrics["skipped_steps"] for metrics in found] == [0, 1, 1]
    assert "beta" not in run.part.seen[0]
    assert [due for _, due in run.metrics] == [False, True, True]  # every 2 steps, and at the end


def test_it_saves_when_it_is_due_and_the_state_is_that_after_the_step() -> None:
    run = Run(steps=4, begun=1, save_every=2)
    run.trainer.run()
    saves = [event for event in run.events if event.startswith(("save", "flush"))]
    assert saves == ["flush", "save 2", "flush", "save 4 last"]
    assert [contents.client_state for contents in run.saving.contents] == [
        {"step": 2, "pairs_seen": 12, "parts": {"part": {"step": 2}}},
        {"step": 4, "pairs_seen": 24, "parts": {"part": {"step": 4}}},
    ]


def test_an_evaluated_step_that_is_the_best_so_far_is_saved_after_its_images_are_drawn() -> None:
    run = Run(steps=4, save_every=100, sample_every=2, best={1: 0.5, 2: 0.7, 3: 0.6})
    run.trainer.run()
    kinds = ("save", "draw", "mark")
    found = [event for event in run.events if event.startswith(kinds)]
    assert found == ["draw 0", "mark 0", "save 1", "mark 1", "draw 2", "save 2", "mark 2", "draw 4"]


def test_a_request_ends_the_run_after_the_step_saved_and_its_file_is_removed() -> None:
    run = Run(steps=5, asked_at=2, sample_every=2)
    assert not run.trainer.run()
    assert run.progress.step == 2
    assert run.events[-3:] == ["flush", "save 2 last", "clear STOP"]
    assert run.lines == ["stopped at step 2 as asked; the same command resumes from there"]
    assert [event for event in run.events if event.startswith("draw")] == ["draw 0"]
    assert run.metrics[-1][1]  # with a line in the log


def test_a_request_that_cannot_be_saved_is_followed_all_the_same() -> None:
    run = Run(steps=5, asked_at=1)
    run.saving.refuses = True
    with pytest.raises(CheckpointError):
        run.trainer.run()
    assert run.events[-1] == "clear STOP"


@pytest.mark.parametrize(("begun", "drawn"), [(0, ["draw 0", "draw 2", "draw 3"]), (1, ["draw 2", "draw 3"])])
def test_images_are_drawn_at_the_start_when_due_and_at_the_end(begun: int, drawn: list[str]) -> None:
    run = Run(steps=3, begun=begun, sample_every=2)
    run.trainer.run()
    assert [event for event in run.events if event.startswith("draw")] == drawn


@pytest.mark.parametrize(
    ("begun", "missing", "drawn"),
    [(2, (2,), ["draw 2", "draw 4", "draw 5"]), (2, (), ["draw 4", "draw 5"]), (3, (3,), ["draw 4", "draw 5"])],
    ids=["stopped or killed before they were drawn", "drawn by the earlier start", "none are due at that step"],
)
def test_images_that_an_earlier_start_did_not_come_to_are_drawn_first(
    begun: int, missing: tuple[int, ...], drawn: list[str]
) -> None:
    run = Run(steps=5, begun=begun, sample_every=2, missing=missing)
    run.trainer.run()
    assert [event for event in run.events if event.startswith("draw")] == drawn


def test_too_many_bad_rows_end_the_run_and_are_named() -> None:
    run = Run(steps=5, bad_rows=2, max_bad_rows=3)
    message = (
        r"^4 rows cannot be read, but data.max_bad_rows allows 3; repair them, or raise the limit:(\n  row \d){4}$"
    )
    with pytest.raises(DataError, match=message):
        run.trainer.run()
    assert run.progress.step == 2
    assert len(run.metrics) == 1  # the first step's two are allowed


def test_a_part_s_error_ends_the_run_once_its_step_is_saved() -> None:
    run = Run(steps=5)
    run.part.error_at = 2
    with pytest.raises(NonFiniteError):
        run.trainer.run()
    assert run.events[-1] == "save 2 last"


def verdict(action: Any, *, good_step: int = 1) -> dict[int, Verdict]:
    return {3: Verdict(action=action, good_step=good_step, sentence="it collapses")}


def test_a_roll_back_takes_all_but_the_pairs_back_and_saves_anew() -> None:
    run = Run(steps=4, verdicts=verdict("roll_back"), save_every=3)
    state = {"step": 1, "pairs_seen": 6, "parts": {"part": {"step": 1}, "watchdog": {"count": 0}}}
    run.store.saved = LoadedCheckpoint(folder=Path("step_1"), client_state=state)
    assert run.trainer.run()
    begin = run.events.index("settle")
    assert run.events[begin : begin + 10] == [
        "settle",
        "set aside after 1",
        "rewind 1",
        "restore {'step': 1} of step_1",
        "watchdog rewinds 1",
        "record rewinds 1",
        "after roll-back {'count': 0}",
        "protect 1",
        "flush",
        "save 1 renews",
    ]
    assert run.lines == ["it collapses; rolled back from step 3 to step_1"]
    # three steps more from step 1 to 4, on pairs that were not seen before
    assert [(metrics["step"], metrics["pairs_seen"]) for metrics, _ in run.metrics] == [
        (1, 6),
        (2, 12),
        (3, 18),
        (2, 24),
        (3, 30),
        (4, 36),
    ]


def test_without_a_checkpoint_to_go_back_to_the_rate_is_lowered_and_the_run_goes_on() -> None:
    run = Run(steps=4, verdicts=verdict("roll_back"))
    assert run.trainer.run()
    assert "lower rate: it collapses; there is no checkpoint of step 1 or before: " in run.events
    assert [metrics["step"] for metrics, _ in run.metrics] == [1, 2, 3, 4]


def test_the_watchdog_may_stop_the_run_saved() -> None:
    run = Run(steps=4, verdicts=verdict("stop"))
    with pytest.raises(CollapseError, match=r"^it collapses; stopped at step 3, which is saved"):
        run.trainer.run()
    assert run.events[-1] == "save 3 last"
