"""A checkpoint exists or it does not, wherever a save is killed; a fake engine writes two small files."""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ds_dpo.checkpoints.folder import Retention
from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.checkpoints.store import CheckpointStore
from ds_dpo.checkpoints.writer import CheckpointWriter, Contents
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import CheckpointError
from ds_dpo.storage.manifest import FileEntry, checkpoint_folders, verify_manifest, write_manifest
from ds_dpo.storage.state_files import StateFile

IDENTITY = RunIdentity(world_size=1, stage=2, precision="bf16", fingerprint="f")
KILLED, CHANGES = 9, {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class FakeEngine:
    """Writes and reads what DeepSpeed's files stand for."""

    module = SimpleNamespace(config={"in_channels": 4, "_name_or_path": "/home/someone/model"})
    needed_bytes = 10
    layout = "as first"

    def layout_digest(self) -> str:
        return self.layout

    def __init__(self) -> None:
        self.moments = torch.tensor([1.0, 2.0])

    def checkpoint_bytes(self) -> int:
        return self.needed_bytes

    def own_checkpoint_bytes(self) -> int:
        return self.needed_bytes

    def checkpoint_files(self, *, client_state: Mapping[str, Any]) -> list[StateFile]:
        return [
            StateFile(name="mp_rank_00_model_states.pt", state=dict(client_state), write=self.write),
            StateFile(
                name="zero_pp_rank_0_mp_rank_00_optim_states.pt",
                state={"moments": self.moments},
                write=lambda state, path: self.write({"moments": state["moments"].tolist()}, path),
            ),
        ]

    def write(self, state: Any, path: Path) -> None:
        path.write_text(json.dumps(state))

    def read_checkpoint(self, folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / "mp_rank_00_model_states.pt").read_text()))

    def read_checkpoint_of_other_layout(self, folder: Path) -> dict[str, Any]:
        return {"from another layout": self.read_checkpoint(folder)}


class Run:
    """A checkpoints folder and what its store says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.engine = FakeEngine()

    def store(self, *, identity: RunIdentity = IDENTITY) -> CheckpointStore:
        engine = cast(Engine, self.engine)
        return CheckpointStore(self.folder, engine=engine, identity=identity, say=self.said.append)

    def writer(self, *, keep: int = 2, keep_every: int | None = None, memory: int = 2**30) -> CheckpointWriter:
        return CheckpointWriter(
            self.folder,
            engine=cast(Engine, self.engine),
            identity=IDENTITY,
            retention=Retention(newest=keep, every_steps=keep_every),
            say=self.said.append,
            available_bytes=lambda: memory,
        )

    def save(self, *steps: int, keep: int = 2, keep_every: int | None = None, renews: bool = False) -> None:
        for step in steps:
            self.writer(keep=keep, keep_every=keep_every).save(step=step, contents=contents(step), renews=renews)

    def loaded(self) -> dict[str, Any] | None:
        found = self.store().load_newest()
        return None if found is None else found.client_state

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def damage(self, step: int) -> None:
        (self.folder / f"step_{step:08d}" / "mp_rank_00_model_states.pt").write_text("{}")


def contents(step: int, *files: StateFile) -> Contents:
    return Contents(client_state={"step": step}, files=files)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")


def test_files_of_other_parts_of_a_run_belong_to_the_checkpoint(run: Run) -> None:
    reference = StateFile(
        name="reference.txt", state="frozen", write=lambda state, path: path.write_text(state) and None
    )
    folder = run.writer().save(step=1, contents=contents(1, reference)).folder
    assert (folder / "reference.txt").read_text() == "frozen"
    assert "reference.txt" in verify_manifest(folder).files
    (folder / "reference.txt").write_text("thawed")
    with pytest.raises(CheckpointError, match=r"reference\.txt"):
        run.store().load_newest()


def test_a_saved_checkpoint_is_complete_and_loads(run: Run) -> None:
    state = {"step": 200, "pairs_seen": 3200}
    folder = run.writer().save(step=200, contents=Contents(client_state=state)).folder
    assert run.names() == ["latest", "step_00000200"]
    assert (run.folder / "latest").read_text().strip() == folder.name
    found = verify_manifest(folder)
    assert (found.step, found.world_size, found.stage, found.precision) == (200, 1, 2, "bf16")
    assert set(found.files) == {
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "denoiser_config.json",
    }
    assert json.loads((folder / "denoiser_config.json").read_text()) == {"in_channels": 4}
    assert run.loaded() == state
    assert run.said == []


def test_where_nothing_was_saved_nothing_is_loaded(run: Run) -> None:
    assert run.loaded() is None


def save_until_killed(run: Run, *, step: int, number: int, renews: bool) -> bool:
    """Save in the background, in a process that ends as by SIGKILL before its file operation `number`.

    True where it got so far.
    """
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, arguments: object) -> None:
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left < 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        try:
            writer = run.writer(keep=1)
            writer.begin(step=step, contents=contents(step), in_background=True, renews=renews)
            writer.finish()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    found = []
    for number in range(200):
        run = Run(tmp_path / str(number))
        run.save(1)
        if not save_until_killed(run, step=2, number=number, renews=False):
            break
        for folder in checkpoint_folders(run.folder):
            assert verify_manifest(folder), "what looks like a checkpoint is one"
        assert verify_manifest(run.folder / (run.folder / "latest").read_text().strip())
        loaded = run.loaded()
        assert loaded is not None
        assert not [line for line in run.said if "skipped:" in line]
        found.append(loaded["step"])
        run.save(3, keep=1)
        assert run.names() == ["latest", "step_00000003"], "what the killed save left is gone"
    else:
        pytest.fail("the save never ended")
    assert found == sorted(found)
    assert len(found) > 10
    assert set(found) == {1, 2}


def test_a_kill_while_a_damaged_one_is_replaced_leaves_the_new_once_it_has_a_manifest(tmp_path: Path) -> None:
    found = []
    for number in range(200):
        run = Run(tmp_path / str(number))
        run.save(1, 2)
        run.damage(2)
        if not save_until_killed(run, step=2, number=number, renews=False):
            break
        is_whole = (run.folder / "partial_step_00000002" / "manifest.json").exists()
        loaded = run.loaded()
        assert loaded is not None
        assert loaded["step"] == 2 or not is_whole, "all ranks had agreed on it"
        found.append(loaded["step"])
    else:
        pytest.fail("the save never ended")
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_kill_while_the_only_checkpoint_is_renewed_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    found = []
    for number in range(200):
        run = Run(tmp_path / str(number))
        run.writer().save(step=2, contents=Contents(client_state={"rate": "old"}))
        if not save_until_killed(run, step=2, number=number, renews=True):
            break
        found.append(run.loaded())
        assert (run.folder / "latest").read_text().strip() == "step_00000002"
        run.save(3, keep=1)
        assert run.names() == ["latest", "step_00000003"]
    else:
        pytest.fail("the save never ended")
    old = found.count({"rate": "old"})
    assert found == [{"rate": "old"}] * old + [{"step": 2}] * (len(found) - old)
    assert 5 < old < len(found) - 3


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
    monkeypatch.setattr("ds_dpo.checkpoints.store.world_size", lambda: world_size)
    monkeypatch.setattr(
        "ds_dpo.checkpoints.store.manifest.verify_manifest", lambda folder, *, names: looked_at.extend(names) or None
    )
    for rank in range(world_size):
        monkeypatch.setattr("ds_dpo.checkpoints.store.rank", lambda rank=rank: rank)
        assert run.store()._verify(folder) is None
    assert sorted(looked_at) == sorted(names)


def test_only_the_newest_stay(run: Run) -> None:
    run.save(8, 9, 10, 11, keep=2)
    assert run.names() == ["latest", "step_00000010", "step_00000011"]


def test_a_damaged_later_one_does_not_push_out_the_one_just_saved(run: Run) -> None:
    run.save(10, 20)
    run.damage(20)
    assert run.loaded() == {"step": 10}
    run.save(12, keep=1)
    assert run.loaded() == {"step": 12}
    assert (run.folder / "latest").read_text().strip() == "step_00000012"


def test_a_damaged_one_of_the_same_step_is_kept_aside(run: Run) -> None:
    run.save(1, 2)
    for _ in range(2):
        run.damage(2)
        run.save(2)
    assert run.names() == [
        "latest",
        "step_00000001",
        "step_00000002",
        "step_00000002.damaged",
        "step_00000002.damaged.2",
    ]
    assert run.loaded() == {"step": 2}


def test_too_little_space_is_known_before_a_byte_is_written(run: Run) -> None:
    run.save(1)
    run.engine.moments = torch.empty(2**60, dtype=torch.uint8, device="meta")
    with pytest.raises(CheckpointError, match=r"no space .* needs 1.07e\+09 GiB, and .* are free; free some"):
        run.save(2)
    assert run.names() == ["latest", "step_00000001"]


@pytest.mark.parametrize(
    ("present", "keep", "saves_left", "more"),
    [
        (0, 1, 100, 2),  # the first stays until the second is complete
        (0, 3, 100, 4),
        (0, 3, 2, 2),  # a short run never has more
        (2, 3, 100, 2),
        (3, 3, 100, 1),
        (5, 3, 100, 1),  # keep was lowered: what is there too many goes with the first save
    ],
)
def test_a_start_asks_for_as_much_space_as_will_be_taken_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, present: int, keep: int, saves_left: int, more: int
) -> None:
    run.save(*range(1, present + 1), keep=9)
    run.engine.needed_bytes = 7
    free = (7 + 3) * more  # 3 of a refreshed reference
    require = run.writer(keep=keep).require_space
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    lines = require(further_bytes=3, saves_left=saves_left, in_background=True)
    assert len(lines) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(CheckpointError, match=rf"{more} more of about .* GiB each will exist at the same time"):
        require(further_bytes=3, saves_left=saves_left, in_background=True)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    "refusal",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # what torch says where the disk took only part of a file
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_a_disk_that_fills_while_writing_is_a_checkpoint_error(
    run: Run, refusal: Exception, in_background: bool
) -> None:
    run.save(1)

    def fill_up(state: Any, path: Path) -> None:
        path.write_text("half")
        raise refusal

    run.engine.write = fill_up  # type: ignore[method-assign]
    writer = run.writer()
    writer.begin(step=2, contents=contents(2), in_background=in_background)
    with pytest.raises(CheckpointError, match="the checkpoint could not be written"):
        writer.finish()
    assert run.names() == ["latest", "step_00000001"], "and nothing of the second"
    assert run.loaded() == {"step": 1}
    assert (run.folder / "latest").read_text().strip() == "step_00000001"
    assert not writer.is_in_flight
    del run.engine.write
    writer.save(step=3, contents=contents(3))
    assert run.names() == ["latest", "step_00000001", "step_00000003"]


@pytest.mark.parametrize("in_background", [False, True])
def test_an_error_of_the_program_is_not_called_a_full_disk(run: Run, in_background: bool) -> None:
    def fail(state: Any, path: Path) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    run.engine.write = fail  # type: ignore[method-assign]
    writer = run.writer()
    writer.begin(step=1, contents=contents(1), in_background=in_background)
    with pytest.raises(RuntimeError, match="mat1"):
        writer.finish()


def test_what_is_saved_in_the_background_is_the_state_of_its_step(run: Run) -> None:
    may_write = threading.Event()
    write = run.engine.write

    def write_late(state: Any, path: Path) -> None:
        may_write.wait()
        write(state, path)

    run.engine.write = write_late  # type: ignore[method-assign]
    writer = run.writer()
    row = [1]
    assert writer.begin(step=1, contents=Contents(client_state={"row": row}), in_background=True)
    assert writer.is_busy
    run.engine.moments.fill_(7.0)  # as the optimizer does, in place
    row.append(2)
    assert run.names() == ["partial_step_00000001"]
    may_write.set()
    saved = writer.finish()
    assert saved.copied_seconds is not None
    shard = json.loads((saved.folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").read_text())
    assert shard == {"moments": [1.0, 2.0]}
    assert run.loaded() == {"row": [1]}


def test_without_memory_for_copies_training_waits(run: Run) -> None:
    """The moments take 8 bytes."""
    writer = run.writer(memory=7)
    assert not writer.begin(step=1, contents=contents(1), in_background=True)
    assert writer.finish().copied_seconds is None
    assert "has 6.52e-09 GiB of memory left, and copies of its ranks' state need 7.45e-09 GiB" in run.said[0]
    writer = run.writer(memory=8)
    assert writer.begin(step=2, contents=contents(2), in_background=True)
    writer.finish()
    assert len(run.said) == 1
    assert run.loaded() == {"step": 2}


def test_multiples_stay_for_ever(run: Run) -> None:
    run.save(5, 10, 15, 20, 25, 27, keep=1, keep_every=10)
    assert run.names() == ["latest", "step_00000010", "step_00000020", "step_00000027"]


@pytest.mark.parametrize(
    ("saved", "protected", "gone"),
    [
        (50, None, [10, 30]),  # 20 and 40 are multiples, 50 and 45 the newest
        (50, 35, [10]),  # a roll-back to 35 or before would go to 30
        (45, None, [10, 30]),  # 50 was passed over: it is not newer, and it stays
        (50, 5, [10, 30]),
    ],
)
def test_what_is_deleted(saved: int, protected: int | None, gone: list[int]) -> None:
    retention = Retention(newest=2, every_steps=20)
    assert sorted(retention.to_delete([50, 40, 45, 30, 20, 10], saved=saved, protected=protected)) == gone


def test_a_checkpoint_that_cannot_be_deleted_is_said_and_the_new_one_stands(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    run.save(1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        run.save(2, keep=1)
    assert "step_00000001 is no longer needed, but cannot be deleted" in run.said[0]
    assert run.loaded() == {"step": 2}
    run.save(3, keep=1)
    assert run.names() == ["latest", "step_00000003"]
