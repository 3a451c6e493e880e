"""Steps that are not finite: left out to the bit by every engine, and runs that end at them, go on, and are replayed.

The runs' data is poisoned itself: a pair whose confidence, its weight, is next to the largest number of fp32.
"""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ds_dpo.data.order import place_of
from ds_dpo.step_record import read_record
from ds_dpo.zero_shards.reader import open_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from launching import ENVIRONMENT, ROOT, curve, launch, metrics, spell, zero_stage
from non_finite_worker import BAD_STEPS, CASES

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent
NUM_PAIRS, PAIRS_PER_STEP, BAD_STEP = 12, 4, 2
COMMON = {
    "config": "miniature",
    "data.confidence": "weight",
    "batch.pairs_per_step": PAIRS_PER_STEP,
    "batch.micro_batch_pairs": 1,
    "schedule.decay_steps": 20,
    "schedule.warmup_steps": 0,
    "cadence.sample_every_steps": "none",
    "cadence.save_every_steps": 1,
    "cadence.keep_checkpoints": 9,
    "non_finite.max_steps_in_a_row": 1,
}
LOUD = {"terms.sft_weight": 1000}  # a pair's loss overflows too, not its gradient alone
RUNS = {
    "fp32": {"deepspeed_config": "zero1_fp32_cpu"},
    "bf16": {"deepspeed_config": "zero2_bf16", **LOUD},
    "fp16": {"deepspeed_config": "zero3_fp16_quiet.json", **LOUD},
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / "non_finite_worker.py"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_on_any_rank_changes_nothing_on_all(engines, case):
    for rank in range(2):
        found = json.loads((engines / f"{case}_{rank}.json").read_text())
        assert {step: names for step, names in found["changed"].items() if names} == {}
        assert found["counts"] == list(range(1, len(BAD_STEPS) + 1))
        assert found["updates"] == 2, "the average saw the first step and the last"
        assert found["differs"] == [], "the step after them is what it would have been"
        assert found["moved"] > 5, "a step that changes nothing compares nothing"


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 128, 255 - shade)).save(file, "PNG")
    return file.getvalue()


def write_pairs(path, *, num_pairs, bad_position):
    """Write pairs in Pick-a-Pic's columns; the one that stands at a position of the first epoch is poisoned."""
    files = [png(10 * number) for number in range(num_pairs)]
    bad, _ = place_of(bad_position, num_pairs=num_pairs, seed=0)
    confidence = [3.4e38 if row == bad else 1.0 for row in range(num_pairs)]
    columns = {"caption": ["a red circle"] * num_pairs, "jpg_0": files, "jpg_1": files[2:] + files[:2]}
    columns |= {"label_0": [1.0] * num_pairs, "confidence": confidence}
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on two ranks, by name: three that end at their first bad step, one that stops and goes on between two."""
    out = tmp_path_factory.mktemp("runs")
    write_pairs(out / "pairs.parquet", num_pairs=NUM_PAIRS, bad_position=(BAD_STEP - 1) * PAIRS_PER_STEP + 2)
    write_pairs(out / "few.parquet", num_pairs=PAIRS_PER_STEP, bad_position=0)
    settings = json.loads((ROOT / "ds_configs" / "zero3_fp16.json").read_text())
    settings["fp16"]["initial_scale_power"] = 0  # with which the other steps do not overflow
    (out / "zero3_fp16_quiet.json").write_text(json.dumps(settings))
    cases = []
    for name, own in RUNS.items():
        common = {**COMMON, "output_dir": out / name, "data.dataset": out / "pairs.parquet", **own}
        if name == "fp16":
            common["deepspeed_config"] = out / own["deepspeed_config"]
        cases.append(spell({**common, "max_train_steps": 3}))
    row = {**COMMON, "output_dir": out / "row", "data.dataset": out / "few.parquet", **RUNS["bf16"]}
    row["non_finite.max_steps_in_a_row"] = 2
    cases += [spell({**row, "max_train_steps": steps}) for steps in (1, 9)]
    goes_on = {**COMMON, "output_dir": out / "bf16", "data.dataset": out / "pairs.parquet", **RUNS["bf16"]}
    cases.append(spell({**goes_on, "max_train_steps": 3, "non_finite.max_steps_in_a_row": "none"}))
    launch(sorted(cases, key=zero_stage), out, ranks=2)
    return out


def record_of(run, step):
    return read_record(run / "non_finite" / f"step_{step:08d}.json")


@pytest.mark.parametrize("name", RUNS)
def test_run_ends_at_its_bad_step_saved_with_the_weights_of_before(runs, name):
    opened = [open_checkpoint(runs / name / "checkpoints" / f"step_{step:08d}") for step in (1, 2)]
    for quantity in ("fp32", "exp_avg"):
        one, other = (checkpoint.read("conv_in.weight", quantity) for checkpoint in opened)
        assert torch.equal(one, other)
        assert bool(torch.isfinite(one).all())
    assert "gradient_norm" not in metrics(runs / name)[BAD_STEP - 1]
    assert curve(runs / name, "skipped_steps")[:2] == [0, 1]
    said = (runs / name / "error_0.txt").read_text()
    assert str(runs / name / "non_finite" / "step_00000002.json") in said
    assert (runs / name / "error_1.txt").read_text() == "", "said once"


@pytest.mark.parametrize("name", RUNS)
def test_record_names_the_pair_that_was_not_finite(runs, name):
    record = record_of(runs / name, BAD_STEP)
    assert [(pair.position, pair.rank) for pair in record.pairs] == [(4, 0), (5, 0), (6, 1), (7, 1)]
    bad = [pair.position for pair in record.pairs if not math.isfinite(pair.loss)]
    assert bad == ([] if name == "fp32" else [6]), "in fp32 it is the gradient alone"
    assert max(record.pairs, key=lambda pair: pair.loss).position == 6
    assert len({pair.pair_id for pair in record.pairs}) == PAIRS_PER_STEP


def test_a_row_and_its_count_go_on_after_a_resume(runs):
    lines = metrics(runs / "row")
    assert [line["skipped_steps"] for line in lines] == [1, 2]
    assert record_of(runs / "row", 2).steps_in_a_row == 2
    assert "2 steps in a row" in (runs / "row" / "error_0.txt").read_text()


def test_the_same_command_goes_on_after_a_bad_step(runs):
    lines = metrics(runs / "bf16")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "gradient_norm" in lines[2]
    assert lines[2]["skipped_steps"] == 1
    assert lines[2]["learning_rate"] == lines[1]["learning_rate"] < lines[0]["learning_rate"]
