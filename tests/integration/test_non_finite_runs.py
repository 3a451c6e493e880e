"""Steps that are not finite: left out to the bit by every engine, and runs that end at them, go on, and are replayed.

The runs' data is poisoned itself: one pair's confidence, its weight, is near the largest number of fp32, so that its
loss still is one and its gradient is not.
"""

import io
import json
import math
from pathlib import Path

import forked
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launching import ENVIRONMENT, ROOT, curve, launch, metrics, spell, zero_stage
from non_finite_worker import BAD_STEPS, CASES
from PIL import Image

from ds_dpo.data.stream.order import place_of
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.step.record import read_record
from ds_dpo.training.replay import replay_record, replay_step
from ds_dpo.zero_shards.reader import open_checkpoint

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent
NUM_PAIRS, PAIRS_PER_STEP, BAD_STEP = 12, 4, 2
ID_COLUMNS = ("ranking_id", "image_0_uid", "image_1_uid")
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
    done = forked.run([str(HERE / "non_finite_worker.py"), str(out)], env=environment)
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
    confidence = [3e37 if row == bad else 1.0 for row in range(num_pairs)]
    columns = {"caption": ["a red circle"] * num_pairs, "jpg_0": files, "jpg_1": files[2:] + files[:2]}
    columns |= {"label_0": [1.0] * num_pairs, "confidence": confidence}
    # the names that ids, and so draws, are made of: else the file's path is among them
    columns |= {name: list(map(str, range(num_pairs))) for name in ID_COLUMNS}
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


def replayed(file, **options):
    """Replay a record; returns whether it is not finite here either, and the lines that it says."""
    said = []
    again = replay_record(
        file, **{"run": None, "checkpoint": None, "detect_anomaly": False, "say": said.append} | options
    )
    return again, said


@pytest.mark.parametrize("name", RUNS)
def test_replay_finds_the_pair_and_the_gradients_that_were_not_finite(runs, name):
    file = runs / name / "non_finite" / "step_00000002.json"
    record = read_record(file)
    again, said = replayed(file)
    assert again
    lines = [line for line in said if line.startswith("pair ")]
    # the losses of the run itself, to the seven digits that are shown; the policy had moved by then
    shown = [float(line.partition("loss ")[2].partition(",")[0]) for line in lines]
    assert shown == pytest.approx([pair.loss for pair in record.pairs], rel=1e-3 if name == "fp32" else 2e-2)
    assert [f"timestep {pair.timestep}:" in line for pair, line in zip(record.pairs, lines, strict=True)] == [True] * 4
    bad = record.pairs[2].pair_id
    assert said[-1].endswith(f"not finite in micro-batches of {bad}")
    assert said[said.index(lines[2]) + 1].startswith("  gradients of this micro-batch are not finite in")
    assert ("NOT FINITE: loss" in lines[2]) == (name != "fp32")


@pytest.mark.filterwarnings("ignore:Error detected in")  # where the operation stands in the forward pass
def test_replay_names_the_operation(runs):
    again, said = replayed(runs / "bf16" / "non_finite" / "step_00000002.json", detect_anomaly=True)
    assert again
    assert [line for line in said if "Backward0' returned nan values" in line]


def test_replay_of_a_healthy_step_is_the_step(runs):
    said = []
    assert replay_step(runs / "fp32", 1, checkpoint=None, detect_anomaly=False, say=said.append)
    line = metrics(runs / "fp32")[0]
    loss, norm = (float(said[-1].partition(f"{name} ")[2].split(",")[0].split(";")[0]) for name in ("loss", "norm"))
    assert loss == pytest.approx(line["loss"], abs=1e-6)
    assert norm == pytest.approx(line["gradient_norm"], rel=1e-4)
    assert said[-1].endswith("all of it is finite")


def changed_record(runs, folder, **fields):
    document = json.loads((runs / "fp32" / "non_finite" / "step_00000002.json").read_text())
    (folder / "step.json").write_text(json.dumps({**document, **fields}))
    return folder / "step.json"


def test_replay_refuses_other_pairs_and_other_runs(runs, tmp_path):
    pairs = json.loads((runs / "fp32" / "non_finite" / "step_00000002.json").read_text())["pairs"]
    with pytest.raises(DataError, match="the dataset is not what it was"):
        replayed(changed_record(runs, tmp_path, pairs=pairs[::-1]), run=runs / "fp32")
    with pytest.raises(ConfigError, match="give the folder of the record's run with --run"):
        replayed(runs / "fp32" / "non_finite" / "step_00000002.json", run=runs / "bf16")


def test_replay_program_says_by_its_status_whether_it_was_reproduced(runs, tmp_path):
    """A record of pairs that are fine does not come true, which is not status 0 and no error either."""
    pairs = json.loads((runs / "fp32" / "non_finite" / "step_00000002.json").read_text())["pairs"]
    said: list[str] = []
    replay_step(runs / "fp32", 1, checkpoint=None, detect_anomaly=False, say=said.append)
    ids = [int(line.split()[1]) for line in said if line.startswith("pair ")]
    fine = [{**pair, "pair_id": own} for pair, own in zip(pairs, ids, strict=True)]
    changed_record(runs, tmp_path, pairs=fine, pairs_seen=0)
    not_here = [str(ROOT / "scripts" / "replay.py"), str(tmp_path / "step.json"), f"--run={runs / 'fp32'}"]
    done = forked.run(not_here, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, "all of it is finite" in done.stdout) == (1, True), done.stderr
