"""Means over a step's pairs, and a metrics file in which a resumed run has each step once."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from repository import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_dpo.run_folder.log import STEP_COLUMNS
from ds_dpo.run_folder.metrics import METRICS, MetricsWriter, StepSums, cut_metrics


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_are_over_pairs_not_over_micro_batches() -> None:
    sums = StepSums()
    sums.add({"loss": torch.tensor([1.0, 2.0, 3.0]), "implicit_margin": torch.tensor([0.5, 0.5, -1.0])})
    sums.add({"loss": torch.tensor([6.0]), "implicit_margin": torch.tensor([2.0])})
    means, totals = sums.reduce(counters={"asked": 1.0, "bad_rows": 3.0})
    assert means == {"loss": 3.0, "implicit_margin": 0.5}  # 12 / 4 and 2 / 4; of the micro-batches' means: 4 and 1
    assert totals == {"asked": 1.0, "bad_rows": 3.0}


def test_sums_are_kept_in_float64() -> None:
    sums = StepSums()
    sums.add({"loss": torch.tensor([2.0**24])})
    for _ in range(4):
        sums.add({"loss": torch.tensor([1.0])})  # fp32 would lose each
    assert sums.reduce(counters={})[0]["loss"] == (2**24 + 4) / 5


def test_lines_after_the_checkpoint_and_a_torn_one_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 0.{step}}}\n' for step in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    assert cut_metrics(path, last_step=3) == 2
    assert path.read_text() == "".join(lines[:3])
    path.write_text("".join(lines[:3]) + '{"st')
    assert cut_metrics(path, last_step=3) == 0
    assert path.read_text() == "".join(lines[:3])
    assert cut_metrics(path, last_step=0) == 3
    aside = tmp_path / "metrics.rolled_back.jsonl"
    assert aside.read_text() == "".join([*lines[3:], *lines[:3]]), "no line is lost"
    assert cut_metrics(tmp_path / "nowhere.jsonl", last_step=3) == 0
    assert not (tmp_path / "nowhere.jsonl").exists()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, last_step=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": float(step)})
    first.close()  # killed after step 5; the checkpoint is of step 3
    second = MetricsWriter(tmp_path, last_step=3)
    for step in range(4, 7):
        second.write({"step": step, "loss": 10.0 * step})
    second.flush()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]


def test_a_line_is_json_whatever_the_values_are(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, last_step=0)
    writer.write({"step": 1, "loss": math.nan, "gradient_norm": math.inf, "learning_rate": 1e-5})
    writer.flush()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"step": 1, "loss": None, "gradient_norm": None, "learning_rate": 1e-5}
    writer.close()


def test_a_metric_that_no_table_explains_is_not_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, last_step=0)
    with pytest.raises(AssertionError, match="los_s"):
        writer.write({"step": 1, "los_s": 0.5})
    writer.close()
    assert {name for _, name, _ in STEP_COLUMNS} <= METRICS.keys()


def test_every_metric_is_documented_in_the_same_words() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.MULTILINE))
    assert rows == METRICS
