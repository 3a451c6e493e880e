"""Which older checkpoints stay once a new one is complete."""

import errno
import shutil
from pathlib import Path

import pytest
from checkpoint_run import Run

from ds_dpo.checkpoints.folder import Retention


def test_only_the_newest_stay(run: Run) -> None:
    run.save(8, 9, 10, 11, keep=2)
    assert run.names() == ["latest", "step_00000010", "step_00000011"]


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
