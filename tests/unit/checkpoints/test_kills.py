"""A checkpoint exists or it does not, wherever a save is killed."""

import os
import sys
from pathlib import Path

import pytest
from checkpoint_run import Run, contents

from ds_dpo.checkpoints.writer import Contents
from ds_dpo.storage.manifest import checkpoint_folders, verify_manifest

KILLED, CHANGES = 9, {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


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
