"""What a save writes, at once or in the background, and how it fails where disk or memory is short."""

import errno
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_run import Run, contents

from ds_dpo.checkpoints.writer import Contents
from ds_dpo.errors import CheckpointError
from ds_dpo.storage.manifest import verify_manifest
from ds_dpo.storage.state_files import StateFile


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
    shard = torch.load(saved.folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
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
