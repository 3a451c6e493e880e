"""Held-out evaluation with a model that is a number, so that its errors follow from the grid alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ds_dpo.batch import PreferenceBatch
from ds_dpo.data.source import BadRowError
from ds_dpo.errors import DataError
from ds_dpo.objectives.pair_errors import PairErrors
from ds_dpo.storage.state_files import write_files
from ds_dpo.watch.held_out import evaluation as evaluation_module
from ds_dpo.watch.held_out import pairs as pairs_module
from ds_dpo.watch.held_out.evaluation import Evaluation, HeldOut
from ds_dpo.watch.held_out.grid import Grid
from ds_dpo.watch.held_out.pairs import HeldOutPairs, read_held_out
from ds_dpo.watch.held_out.record import HeldOutRecord, describe

GRID = Grid(first_timestep=0, end_timestep=1000, draws_per_decile=2, seed=3)
SHAPE = (4, 2, 2)


def pair(pair_id: int, *, width: int = 2) -> PreferenceBatch:
    """A pair whose chosen latents are its id / 10 and whose rejected ones are 1 more."""
    latents = torch.stack([torch.full((4, 2, width), pair_id / 10), torch.full((4, 2, width), pair_id / 10 + 1)])
    return PreferenceBatch(
        latents=latents,
        noise=torch.zeros(1, 4, 2, width),
        timesteps=torch.tensor([0]),
        text_states=torch.full((1, 1, 1), float(pair_id)),
        pooled=None,
        extras={"time_ids": torch.tensor([[float(pair_id)], [-float(pair_id)]])},
        pair_ids=torch.tensor([pair_id]),
        target_probabilities=torch.ones(1),
        weights=torch.ones(1),
    )


class NumberStep:
    """Errors of (weight x timestep + latent + noise), and of the same with weight 0 as reference."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.sizes: list[int] = []

    def errors(self, batch: PreferenceBatch) -> PairErrors:
        self.sizes.append(batch.num_pairs)
        assert torch.equal(batch.text_states.flatten(), batch.pair_ids.float())
        assert torch.equal(batch.extras["time_ids"].flatten(), torch.cat([batch.pair_ids, -batch.pair_ids]).float())
        chosen, rejected = batch.latents.chunk(2)

        def errors(latents: torch.Tensor, weight: float) -> torch.Tensor:
            value = weight * batch.timesteps.view(-1, 1, 1, 1) / 1000 + latents + batch.noise
            return value.square().mean(dim=(1, 2, 3))

        chosen_error, rejected_error = errors(chosen, self.weight), errors(rejected, self.weight)
        return PairErrors(
            policy_chosen_error=chosen_error,
            target_probability=batch.target_probabilities,
            asked_for={
                "policy_rejected_error": rejected_error,
                "chosen_difference": chosen_error - errors(chosen, 0),
                "rejected_difference": rejected_error - errors(rejected, 0),
            },
        )


def held_out(
    step: Any,
    pairs: HeldOutPairs,
    *,
    at_once: int = 4,
    reference_step: Any = None,
    grid: Grid = GRID,
    record: Callable[[Evaluation], None] = lambda found: None,
) -> HeldOut:
    return HeldOut(
        pairs,
        grid,
        policy_step=step,
        reference_step=reference_step,
        module=nn.Linear(1, 1),
        device=torch.device("cpu"),
        micro_batch_pairs=at_once,
        beta=10,
        is_due=lambda step: step % 2 == 0,
        record=record,
        rewind=lambda step: None,
        say=lambda line: None,
    )


def of_ids(*ids: int) -> HeldOutPairs:
    return HeldOutPairs(own=[pair(each) for each in ids], positions=list(range(len(ids))), pair_ids=list(ids))


def expected_errors(pair_id: int, weight: float) -> tuple[float, float]:
    """Mean chosen and rejected error of a pair over the grid, one item after another."""
    sums = np.zeros(2)
    for item in range(GRID.num_items):
        timestep, noise = GRID.draw(pair_id, item, latent_shape=SHAPE)
        for side in (0, 1):
            sums[side] += float(((weight * timestep / 1000 + pair_id / 10 + side + noise.double()) ** 2).mean())
    chosen, rejected = sums / GRID.num_items
    return chosen, rejected


def test_grid_has_its_draws_in_each_tenth_and_they_never_change() -> None:
    for item in range(GRID.num_items):
        timestep, noise = GRID.draw(7, item, latent_shape=SHAPE)
        assert timestep // 100 == item // 2
        again = GRID.draw(7, item, latent_shape=SHAPE)
        assert again[0] == timestep
        assert torch.equal(again[1], noise)
    drawn = [GRID.draw(pair_id, item, latent_shape=SHAPE) for pair_id in (7, 8) for item in range(GRID.num_items)]
    assert len({timestep for timestep, _ in drawn}) > 30
    assert len({float(noise.sum()) for _, noise in drawn}) == len(drawn)


def test_deciles_cut_a_range_into_ten_that_leave_nothing_out() -> None:
    grid = Grid(first_timestep=3, end_timestep=26, draws_per_decile=1, seed=0)
    assert [step for decile in range(10) for step in grid.decile_range(decile)] == list(range(3, 26))


def test_errors_are_those_of_the_grid_and_compared_with_the_start() -> None:
    found: list[Evaluation] = []
    step = NumberStep(0.0)
    part = held_out(step, of_ids(5, 6, 9), record=found.append)
    part.begin(0)
    step.weight = -0.4
    part.after_step(1, {})
    part.after_step(2, {})
    assert [each.step for each in found] == [0, 2]
    first, second = (each.summary.overall for each in found)
    assert (first["accuracy"].mean, first["chosen_difference"].mean, first["margin"].mean) == (0.5, 0, 0)
    start = [expected_errors(each, 0.0) for each in (5, 6, 9)]
    now = [expected_errors(each, -0.4) for each in (5, 6, 9)]
    assert second["policy_chosen_error"].mean == pytest.approx(np.mean([c for c, _ in now]))
    assert second["policy_rejected_error"].mean == pytest.approx(np.mean([r for _, r in now]))
    assert second["chosen_difference"].mean == pytest.approx(np.mean(now, 0)[0] - np.mean(start, 0)[0])
    assert second["rejected_difference"].mean == pytest.approx(np.mean(now, 0)[1] - np.mean(start, 0)[1])
    assert found[1].start_chosen_error == pytest.approx(np.mean(start, 0)[0])
    assert found[1].chosen_change is not None
    assert found[1].chosen_change.mean == pytest.approx(second["chosen_difference"].mean)


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_numbers_are_the_same_for_any_micro_batch(at_once: int) -> None:
    wanted, found = (held_out(NumberStep(0.3), of_ids(5, 6, 9), at_once=each) for each in (1, at_once))
    wanted.begin(0)
    found.begin(0)
    assert wanted.latest is not None
    assert found.latest is not None
    for name, estimate in wanted.latest.summary.overall.items():
        assert vars(found.latest.summary.overall[name]) == pytest.approx(vars(estimate), rel=1e-6)


def test_pairs_of_two_shapes_share_no_micro_batch() -> None:
    pairs = HeldOutPairs(own=[pair(5), pair(6, width=4)], positions=[0, 1], pair_ids=[5, 6])
    step = NumberStep(0.3)
    held_out(step, pairs, at_once=15).begin(0)
    assert step.sizes == [15, 5, 15, 5]


def test_ranks_do_as_many_forwards_and_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks by hand: rank 0 has pairs 5 and 9, rank 1 has 6; what each would gather is noted and then given."""
    alone = held_out(NumberStep(0.3), of_ids(5, 6, 9))
    alone.begin(0)
    own = [
        HeldOutPairs(own=[pair(5), pair(9)], positions=[0, 2], pair_ids=[5, 6, 9]),
        HeldOutPairs(own=[pair(6)], positions=[1], pair_ids=[5, 6, 9]),
    ]
    said: list[list[Any]] = [[], []]
    for rank in (0, 1):
        number_of_forwards = [10, 5]

        def gather(value: Any, rank: int = rank, numbers: Any = number_of_forwards) -> list[Any]:
            said[rank].append(value)
            return numbers if isinstance(value, int) else [value]

        monkeypatch.setattr(evaluation_module, "gather_objects", gather)
        step = NumberStep(0.3)
        part = held_out(step, own[rank])
        part._errors(part._policy_errors)
        assert len(step.sizes) == 10
    both = [parts[1] for parts in said]
    monkeypatch.setattr(evaluation_module, "gather_objects", lambda value: [2] if isinstance(value, int) else both)
    part = held_out(NumberStep(0.3), own[0])
    part.begin(0)
    assert part.latest is not None
    assert alone.latest is not None
    assert part.latest.summary == alone.latest.summary


def saved(part: HeldOut, folder: Path) -> dict[str, Any]:
    write_files(part.files(), folder)
    state: dict[str, Any] = json.loads(json.dumps(part.state()))
    return state


def test_resumed_run_is_compared_with_the_same_start(tmp_path: Path) -> None:
    step = NumberStep(0.0)
    whole = held_out(step, of_ids(5, 6))
    whole.begin(0)
    step.weight = 0.2
    whole.after_step(2, {})
    state = saved(whole, tmp_path)
    resumed_step = NumberStep(0.2)
    resumed = held_out(resumed_step, of_ids(5, 6))
    resumed.restore(state, tmp_path)
    resumed.begin(2)
    assert resumed_step.sizes == []
    step.weight = resumed_step.weight = -0.5
    whole.after_step(4, {})
    resumed.after_step(4, {})
    assert resumed.latest is not None
    assert whole.latest is not None
    assert replace(resumed.latest, seconds=0) == replace(whole.latest, seconds=0)


@pytest.mark.parametrize("has_reference", [True, False])
def test_other_pairs_on_the_way_are_compared_with_the_reference_or_said_to_be_new(
    tmp_path: Path, has_reference: bool
) -> None:
    step = NumberStep(0.0)
    before = held_out(step, of_ids(5, 6))
    before.begin(0)
    state = saved(before, tmp_path)
    step.weight = -0.4
    other = held_out(step, of_ids(5, 7), reference_step=NumberStep(-0.4) if has_reference else None)
    other.restore(state, tmp_path)
    other.begin(3)
    other.after_step(4, {})
    assert other.latest is not None
    difference = other.latest.summary.overall["chosen_difference"].mean
    if has_reference:
        now, start = (np.mean([expected_errors(each, weight)[0] for each in (5, 7)]) for weight in (-0.4, 0.0))
        assert difference == pytest.approx(now - start)
        assert other.latest.start_step == 0
    else:
        assert difference == 0
        assert other.latest.start_step == 3


class Rows:
    """A reader of pairs 0 to 9, of which pair 4 cannot be read."""

    bucket_sizes = (6, 4)

    def read(self, index: int, visit: int) -> Any:
        assert visit == 0
        if index == 4:
            raise BadRowError("row 4", "torn")
        return SimpleNamespace(index=index)

    def join(self, parts: list[Any]) -> Any:
        raise AssertionError("pairs are read one by one")


def read(num_pairs: int, *, max_bad_rows: int = 1, said: list[str] | None = None) -> HeldOutPairs:
    lines = [] if said is None else said
    return read_held_out(
        Rows(), lambda row: pair(row.index), num_pairs=num_pairs, seed=2, max_bad_rows=max_bad_rows, say=lines.append
    )


def test_pairs_are_chosen_by_the_seed_and_an_unreadable_one_is_left_out_and_named() -> None:
    said: list[str] = []
    found = read(99, said=said)
    assert sorted(found.pair_ids) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert found.pair_ids != sorted(found.pair_ids)
    assert said == ["held-out pair left out: row 4: torn"]
    assert read(4).pair_ids == found.pair_ids[:4]
    with pytest.raises(
        DataError, match=r"^1 held-out pairs cannot be read, but data\.max_bad_rows allows 0; repair .*:\n  row 4"
    ):
        read(99, max_bad_rows=0)


def test_ranks_share_the_pairs_and_one_without_any_takes_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = read(4)
    found: list[HeldOutPairs] = []
    monkeypatch.setattr(pairs_module, "world_size", lambda: 6)
    ids = ({place: pair_id for place, pair_id in enumerate(alone.pair_ids)}, [])
    monkeypatch.setattr(pairs_module, "gather_objects", lambda value: [ids])
    for rank in range(6):
        monkeypatch.setattr(pairs_module, "rank", lambda rank=rank: rank)
        found.append(read(4))
    assert [each.positions for each in found] == [[0], [1], [2], [3], [0], [0]]
    for each in found:
        assert each.pair_ids == alone.pair_ids
        assert [int(own.pair_ids) for own in each.own] == [alone.pair_ids[place] for place in each.positions]


def test_record_has_a_line_an_evaluation_and_cuts_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    path, said = tmp_path / "evaluation" / "held_out.jsonl", []
    scalars: dict[str, float] = {}
    writer: Any = SimpleNamespace(write_scalars=lambda tags, step: scalars.update(tags))
    record = HeldOutRecord(path, last_step=0, writer=writer, say=said.append)
    step = NumberStep(0.0)
    part = held_out(step, of_ids(5, 6), record=record)
    part.begin(0)
    step.weight = -0.4
    for number in (2, 4):
        part.after_step(number, {})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert part.latest is not None
    overall = part.latest.summary.overall["margin"]
    assert lines[2]["overall"]["margin"] == [overall.mean, overall.low, overall.high]
    assert lines[2]["deciles"][9]["timesteps"] == [900, 999]
    assert scalars["held_out/margin"] == overall.mean
    assert scalars["held_out_margin/timesteps_900_999"] == lines[2]["deciles"][9]["margin"][0]
    assert said[2] == describe(part.latest)
    HeldOutRecord(path, last_step=2, writer=writer, say=said.append)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2]
    HeldOutRecord(path, last_step=0, writer=writer, say=said.append)
    assert path.read_text() == ""
