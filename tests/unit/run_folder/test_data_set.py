"""A run goes on with the data set that it was trained on, or is refused by what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.config.load import load_config
from ds_dpo.errors import ConfigError
from ds_dpo.run_folder.data_set import DataSet
from ds_dpo.run_folder.folder import RunFolder

CONFIG = load_config(["--config", "miniature"]).config
DATA = DataSet(
    counts={"rows": 10, "ties": 1, "pairs": 9, "prompts": 3},
    fingerprint={"content": "abc", "pairs": "def", "buckets": "one"},
)
OLD, NEW = "a" * 40, "b" * 40


def run_with(tmp_path: Path, saved: dict[str, Any], *, has_checkpoint: bool = True) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.write_start(CONFIG, {}, world_size=1, data=saved)
    if has_checkpoint:
        (run.checkpoints / "step_00000002").mkdir(parents=True)
    return run


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"counts": {"rows": 9, "ties": 1, "pairs": 8}}, ["rows: 10 -> 9", "pairs: 9 -> 8"]),
        (
            {"fingerprint": {"content": "xyz", "pairs": "def", "buckets": "one"}},
            ["files, by names and sizes or by their text: abc -> xyz"],
        ),
        (
            {"fingerprint": {"content": "abc", "pairs": "x", "buckets": "8x8"}},
            ["chosen pairs and their winners: def -> x", "aspect buckets: one -> 8x8"],
        ),
        # what an earlier version did not name, or a later one does not
        ({"counts": {"rows": 10, "pairs": 9, "prompts": 4}}, []),
        ({"commit": NEW}, []),
        ({}, []),
    ],
)
def test_another_data_set_is_refused_by_what_differs(tmp_path: Path, changed: Any, lines: list[str]) -> None:
    run = run_with(tmp_path, DATA.as_saved())
    if not lines:
        run.require_same_data(CONFIG, replace(DATA, **changed))
        return
    with pytest.raises(ConfigError) as caught:
        run.require_same_data(CONFIG, replace(DATA, **changed))
    first, *listed, last = str(caught.value).splitlines()
    assert first.startswith(f"{run.path} was trained on another data set than data.dataset ds_dpo://assets/miniature/")
    assert [line.strip() for line in listed] == lines
    assert last == "restore it, or give another output_dir"


def test_counts_alone_are_compared_with_a_start_of_an_earlier_version(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"data": {"rows": 10, "pairs": 9}})
    run.require_same_data(CONFIG, DATA)
    with pytest.raises(ConfigError, match="pairs: 9 -> 8"):
        run.require_same_data(CONFIG, replace(DATA, counts={"rows": 10, "pairs": 8}))


def test_a_run_without_a_checkpoint_has_trained_on_nothing(tmp_path: Path) -> None:
    run = run_with(tmp_path, DATA.as_saved(), has_checkpoint=False)
    run.require_same_data(CONFIG, replace(DATA, counts={"rows": 1}))
    RunFolder(tmp_path / "new").require_same_data(CONFIG, DATA)


def test_a_data_set_of_the_hub_is_named_by_its_commit(tmp_path: Path) -> None:
    run = run_with(tmp_path, replace(DATA, commit=OLD).as_saved())
    assert run.newest_start()["data_commit"] == OLD
    moved = replace(DATA, commit=NEW, counts={"rows": 11})
    with pytest.raises(ConfigError, match=rf"restore it \(data\.revision {OLD} names what it was trained on\), or"):
        run.require_same_data(CONFIG, moved)
