"""Rounds of the miniature, killed at five points, end as those that nothing interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import forked
import pyarrow.parquet as pq
import pytest
import torch
from repository import ROOT

from ds_dpo.zero_shards.reader import ZeroCheckpoint, open_checkpoint

pytestmark = pytest.mark.slow
SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    command = [str(ROOT / "tests" / "support" / "forked_rounds.py"), str(folder)]
    done = forked.run(command, env={**os.environ, **SETTINGS})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def final(folder: Path, number: int) -> ZeroCheckpoint:
    return open_checkpoint(folder / f"round_{number:02d}" / "run" / "checkpoints" / "step_00000003")


def test_five_kills_change_nothing(folder: Path) -> None:
    assert len(json.loads((folder / "killed.json").read_text())) == 5
    whole, killed = folder / "whole", folder / "killed"
    for name in ("rounds.json", "summary.md"):
        assert (whole / name).read_text() == (killed / name).read_text()
    for number in (1, 2):
        pairs = f"round_{number:02d}/pairs/pairs.parquet"
        assert pq.read_table(whole / pairs).equals(pq.read_table(killed / pairs))
        one, other = final(whole, number), final(killed, number)
        assert all(torch.equal(one.read(name), other.read(name)) for name in one.parameters)


def test_the_second_round_goes_on_from_the_first_with_images_of_its_own(folder: Path) -> None:
    record = json.loads((folder / "whole" / "rounds.json").read_text())
    assert (record["state"], record["best"]) == ("done", "round_02")
    assert [each["round"] for each in record["rounds"]] == [1, 2]
    drawn = [pq.read_table(folder / "whole" / f"round_{number:02d}" / "pairs" / "pairs.parquet") for number in (1, 2)]
    seeds = [set(table["seed_0"].to_pylist()) | set(table["seed_1"].to_pylist()) for table in drawn]
    assert not seeds[0] & seeds[1]
    log = (folder / "whole" / "round_02" / "run" / "log.txt").read_text()
    last = folder / "whole" / "round_01" / "run" / "checkpoints" / "step_00000003"
    assert f"policy: starts from model.policy_init {last}" in log
    one, other = final(folder / "whole", 1), final(folder / "whole", 2)
    assert any(not torch.equal(one.read(name), other.read(name)) for name in one.parameters)
