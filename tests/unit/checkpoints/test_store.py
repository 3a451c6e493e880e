"""A start reads the newest checkpoint that it can use, whatever layout saved it, and says what it passes over."""

import json
import shutil
from dataclasses import replace

import pytest
from checkpoint_run import IDENTITY, Run

from ds_dpo.errors import CheckpointError
from ds_dpo.storage.manifest import FileEntry, verify_manifest, write_manifest


def test_where_nothing_was_saved_nothing_is_loaded(run: Run) -> None:
    assert run.loaded() is None


def test_a_damaged_newest_is_passed_over_and_said(run: Run) -> None:
    run.save(1, 2)
    run.damage(2)
    assert run.loaded() == {"step": 1}
    assert len(run.said) == 1
    assert "step_00000002/mp_rank_00_model_states.pt" in run.said[0]


def test_nothing_valid_is_an_error_that_names_each_reason(run: Run) -> None:
    run.save(1, 2)
    run.damage(1)
    run.damage(2)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*step_00000002.*; .*step_00000001"):
        run.store().load_newest()


def test_a_latest_without_its_checkpoint_is_an_error(run: Run) -> None:
    run.save(1)
    shutil.rmtree(run.folder / "step_00000001")
    with pytest.raises(CheckpointError, match=r"latest names 'step_00000001', but .* holds no checkpoint"):
        run.store().load_newest()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"world_size": 4}, "was saved by 1 rank(s) at ZeRO stage 2, but this start has 4 rank(s) at ZeRO stage 2"),
        ({"stage": 3}, "was saved by 1 rank(s) at ZeRO stage 2, but this start has 1 rank(s) at ZeRO stage 3"),
        ({}, "was saved by 1 rank(s) at ZeRO stage 2, but this start has other DeepSpeed settings"),
    ],
)
def test_shards_of_another_layout_are_read_tensor_by_tensor(run: Run, other: dict[str, int], said: str) -> None:
    run.save(1)
    if not other:
        run.engine.layout = "with other sub-groups"
    loaded = run.store(identity=replace(IDENTITY, **other)).load_newest()
    assert loaded is not None
    assert loaded.client_state == {"from another layout": {"step": 1}}
    (line,) = run.said
    assert said in line


def test_one_of_a_version_that_told_no_layout_is_read_as_it_was(run: Run) -> None:
    run.save(1)
    path = run.folder / "step_00000001" / "manifest.json"
    told = json.loads(path.read_text())
    assert told.pop("layout") == "as first"
    path.write_text(json.dumps(told))
    run.engine.layout = "whatever"
    assert run.loaded() == {"step": 1}
    assert run.said == []


def test_another_precision_is_refused(run: Run) -> None:
    run.save(1)
    with pytest.raises(CheckpointError, match="saved in precision bf16, but this start uses fp32"):
        run.store(identity=replace(IDENTITY, precision="fp32")).load_newest()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_each_file_is_verified_by_exactly_one_of_any_number_of_ranks(
    run: Run, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    run.save(1)
    folder = run.folder / "step_00000001"
    found = verify_manifest(folder)
    of_four_ranks = {f"ema_rank_{rank:05d}.pt": FileEntry(size=0, sha256="") for rank in range(4)}
    names = found.files | of_four_ranks
    write_manifest(folder, replace(found, files=names))
    looked_at: list[str] = []
    judged: list[str] = []
    monkeypatch.setattr("ds_dpo.checkpoints.store.world_size", lambda: world_size)
    monkeypatch.setattr("ds_dpo.checkpoints.store.require_harmless", lambda folder, names: judged.extend(names))
    monkeypatch.setattr(
        "ds_dpo.checkpoints.store.manifest.verify_manifest", lambda folder, *, names: looked_at.extend(names) or None
    )
    for rank in range(world_size):
        monkeypatch.setattr("ds_dpo.checkpoints.store.rank", lambda rank=rank: rank)
        assert run.store()._verify(folder) is None
    assert sorted(looked_at) == sorted(names)
    assert sorted(judged) == sorted(names)


def test_a_chosen_step_is_loaded_and_later_ones_are_set_aside(run: Run) -> None:
    run.save(1, 2, 3, 4, keep=9)
    loaded = run.store().load_step(2)
    assert loaded.client_state == {"step": 2}
    assert run.names()[-2:] == ["step_00000003", "step_00000004"], "nothing is moved before training begins"
    run.store().go_back_to(2)
    assert run.names() == [
        "latest",
        "step_00000001",
        "step_00000002",
        "step_00000003.rolled_back",
        "step_00000004.rolled_back",
    ]
    assert (run.folder / "latest").read_text() == "step_00000002\n"
    assert [line.partition(" is now ")[2].partition(",")[0] for line in run.said] == [
        "step_00000003.rolled_back",
        "step_00000004.rolled_back",
    ]
    assert run.loaded() == {"step": 2}


def test_a_chosen_step_that_cannot_be_used_is_refused_although_others_can(run: Run) -> None:
    run.save(1, 2)
    run.damage(1)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*step_00000001"):
        run.store().load_step(1)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7"):
        run.store().load_step(7)
