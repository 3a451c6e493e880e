"""Real runs under the real launcher: equal for any ranks and ZeRO stage, and across a stop.

One launch of `deepspeed` with two ranks and one of plain Python run all cases; the tests look at what they left.
"""

import io
import json
import math
import subprocess
import sys

import forked
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launching import ENVIRONMENT, ROOT, curve, launch, metrics, spell, zero_stage
from PIL import Image
from saved_tensors import differing_tensors, saved_tensors

from ds_dpo.zero_shards.reader import open_checkpoint

pytestmark = pytest.mark.launch
STEPS = 10
SETTINGS = {
    "config": "miniature",
    "pairs_per_step": 4,
    "max_train_steps": STEPS,
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 20,
    "cadence.save_every_steps": 5,
    "cadence.sample_every_steps": "none",
}
STAGES = (1, 2, 3)
NUM_WEIGHTS = 2_301_076  # of the miniature's UNet
LOSSES_OF_A_STEP = ("loss", "policy_chosen_error", "policy_rejected_error")


def arguments(out, **settings):
    """Spell one start of train.py."""
    # one spelling of a name, for a later value to replace an earlier one
    given = {name.replace("__", "."): value for name, value in settings.items()}
    return spell({**SETTINGS, "output_dir": out, **given})


def case(out, name, *, stage, micro, precision="fp32_cpu", **settings):
    return arguments(out / name, deepspeed_config=f"zero{stage}_{precision}", micro_batch_pairs=micro, **settings)


FEW_ROWS = {"data__max_rows": 100, "data__flip": "independent", "data__prompt_dropout": 0.3}
NOISED = {  # every draw that there is; of no consequence to a cache
    "diffusion__timestep_sampling": "logit_normal",
    "diffusion__logit_mean": 0,
    "diffusion__logit_std": 1,
    "diffusion__noise_offset": 0.05,
    "diffusion__input_perturbation": 0.1,
    "diffusion__error_weighting": "min_snr",
    "diffusion__snr_gamma": 5,
}
TWO_SHAPES = {"data__aspect_buckets": "true", "data__bucket_step": 8, "micro": 2, "data__size_conditioning": "true"}


def make_cache(folder):
    """Encode the pairs of FEW_ROWS with scripts/cache.py, as a user does."""
    options = [text for text in arguments("unused", **FEW_ROWS) if "output_dir" not in text]
    program = [str(ROOT / "scripts" / "cache.py"), *options, "--deepspeed_config=zero2_fp32_cpu", "--dtype=fp32"]
    done = forked.run([*program, "--flips", f"--out={folder}"], env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def write_pairs_of_two_shapes(path):
    """Write 12 square pairs and 12 wide ones in Pick-a-Pic's columns."""
    sizes = [(32, 32), (40, 24)] * 12
    files = [png(size, shade=10 * number) for number, size in enumerate(sizes)]
    columns = {"caption": ["a red circle"] * 24, "jpg_0": files, "jpg_1": files[2:] + files[:2], "label_0": [1.0] * 24}
    pq.write_table(pa.table(columns), path)


def png(size, *, shade):
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 128, 255 - shade)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, by folder name, and what rank 0 printed."""
    out = tmp_path_factory.mktemp("runs")
    two_ranks = [case(out, f"2_ranks_{stage}", stage=stage, micro=2) for stage in STAGES]
    for stage in STAGES:
        two_ranks.append(case(out, f"resumed_{stage}", stage=stage, micro=2, max_train_steps=5))
        two_ranks.append(case(out, f"resumed_{stage}", stage=stage, micro=2))
        two_ranks.append(case(out, f"bf16_{stage}", stage=stage, micro=2, precision="bf16"))
        every_step = {"cadence__save_every_steps": 1, "cadence__keep_checkpoints": 9, "ema__decay": 0.3}
        for steps in (2, 4):  # stopped once on the way
            two_ranks.append(case(out, f"ema_{stage}", stage=stage, micro=2, max_train_steps=steps, **every_step))
    two_ranks += [case(out, f"fp16_{stage}", stage=stage, micro=2, precision="fp16") for stage in (2, 3)]
    two_ranks.append(
        case(
            out,
            "sft",
            stage=2,
            micro=2,
            precision="bf16",
            objective__type="sft",
            validation__scorers="reward",
            cadence__sample_every_steps=10,
            max_train_steps=3,
        )
    )
    one_rank = [case(out, "1_rank", stage=2, micro=4)]
    make_cache(out / "cache")
    few = {"stage": 2, "micro": 4, "max_train_steps": 5, **FEW_ROWS, **NOISED}
    one_rank += [case(out, "online", **few), case(out, "cached", data__cache=out / "cache", **few)]
    write_pairs_of_two_shapes(out / "shapes.parquet")
    one_rank.append(case(out, "buckets", **{**few, **TWO_SHAPES}, data__dataset=out / "shapes.parquet"))
    for cases, ranks in ((two_ranks, 2), (one_rank, 1)):
        done = launch(sorted(cases, key=zero_stage), out, ranks=ranks, by="launcher" if ranks == 2 else "forks")
        (out / f"printed_{ranks}.txt").write_text(done.stdout + done.stderr)
    return out


@pytest.mark.parametrize("name", [f"2_ranks_{stage}" for stage in STAGES])  # many more: test_invariance.py
def test_fp32_curve_is_the_same_for_any_ranks_and_stage(runs, name):
    assert [line["step"] for line in metrics(runs / name)] == list(range(1, STEPS + 1))
    for quantity in LOSSES_OF_A_STEP:
        assert curve(runs / name, quantity) == pytest.approx(curve(runs / "1_rank", quantity), abs=1e-4)
    losses = curve(runs / name)
    assert max(losses) - min(losses) > 0.01, "a curve that does not move compares nothing"


@pytest.mark.parametrize("name", [*(f"2_ranks_{s}" for s in STAGES), *(f"bf16_{s}" for s in STAGES), "1_rank"])
def test_first_loss_is_ln_2_and_preflight_found_no_difference(runs, name):
    first = metrics(runs / name)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["chosen_difference"], first["rejected_difference"], first["implicit_accuracy"]) == (0, 0, 0.5)
    assert "largest difference 0" in (runs / name / "log.txt").read_text()


def test_shipped_base_knows_the_latents_of_its_own_pairs(runs):
    """A wrong scale, a wide posterior or another schedule would each give it ten times the error it was trained to."""
    assert 0.01 < metrics(runs / "1_rank")[0]["policy_chosen_error"] < 0.15


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(runs, stage):
    timed = {"pairs_per_second", "step_seconds", "data_seconds", "peak_memory_gib"}
    resumed, whole = metrics(runs / f"resumed_{stage}"), metrics(runs / f"2_ranks_{stage}")
    for resumed_step, whole_step in zip(resumed, whole, strict=True):
        assert {k: v for k, v in resumed_step.items() if k not in timed} == {
            k: v for k, v in whole_step.items() if k not in timed
        }
    found, expected = (
        saved_tensors(runs / name / "checkpoints" / "step_00000010")
        for name in (f"resumed_{stage}", f"2_ranks_{stage}")
    )
    shards = {name.partition("/")[0] for name in expected if "optim_states.pt" in name}
    assert len(shards) == 2, "one of each rank"
    assert sum(tensor.numel() for tensor in expected.values()) > 3 * NUM_WEIGHTS, (
        "masters and both moments are compared"
    )
    assert differing_tensors(found, expected) == []
    assert "resumed from step 5" in (runs / f"resumed_{stage}" / "log.txt").read_text()


def test_cached_run_is_the_online_one(runs):
    online, cached = metrics(runs / "online"), metrics(runs / "cached")
    for quantity in (*LOSSES_OF_A_STEP, "gradient_norm"):  # a norm is about 25, a loss below 1
        expected = pytest.approx([line[quantity] for line in online], abs=1e-4, rel=1e-5)
        assert [line[quantity] for line in cached] == expected
    counted = [json.loads((runs / name / "environment.json").read_text())[0]["data"] for name in ("online", "cached")]
    assert counted[0] == counted[1]
    assert counted[0]["rows"] == 100 == counted[0]["pairs"] + counted[0]["dropped_ties"]


def test_run_in_buckets_of_two_shapes_trains(runs):
    lines = metrics(runs / "buckets")
    assert len(lines) == 5
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["bad_rows"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_moving_average_is_that_of_the_saved_masters(runs, stage):
    checkpoints = runs / f"ema_{stage}" / "checkpoints"
    opened = [open_checkpoint(checkpoints / f"step_{step:08d}") for step in range(1, 5)]
    for name in ("conv_in.weight", "time_embedding.linear_1.bias"):
        expected = opened[0].read(name).double()
        # kept: k / (k + 9) of the k-th update, at most 0.3
        for kept, checkpoint in zip((2 / 11, 3 / 12, 0.3), opened[1:], strict=True):
            expected = kept * expected + (1 - kept) * checkpoint.read(name).double()
        average = opened[-1].read(name, "ema").double()
        assert (average - expected).abs().max() < 1e-7
        assert (average - opened[-1].read(name)).abs().max() > 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_follows_bf16(runs, stage):
    fp16, bf16 = metrics(runs / f"fp16_{stage}"), metrics(runs / f"bf16_{stage}")
    assert fp16[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert fp16[0]["policy_chosen_error"] == pytest.approx(bf16[0]["policy_chosen_error"], rel=5e-3)
    # the scale starts at 2^16 and halves at each update that overflows, until updates are applied
    assert 1 <= fp16[-1]["loss_scale"] < 2**16
    assert 0 < fp16[-1]["skipped_steps"] < STEPS
    applied = [line for line in fp16 if "gradient_norm" in line]
    assert len(applied) == STEPS - fp16[-1]["skipped_steps"]
    assert applied[0]["gradient_norm"] == pytest.approx(bf16[0]["gradient_norm"], rel=1)
    assert all(math.isfinite(line["loss"]) for line in fp16)


def test_sft_trains_on_chosen_images_alone(runs):
    lines = metrics(runs / "sft")
    assert [line["loss"] for line in lines] == [line["policy_chosen_error"] for line in lines]
    assert not {"implicit_accuracy", "policy_rejected_error", "reference_chosen_error"} & lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(metrics(runs / "bf16_2")[0]["policy_chosen_error"], rel=2e-2)
    assert sorted(path.name for path in (runs / "sft" / "samples").iterdir()) == [
        "reference",
        "step_00000000.png",
        "step_00000003.png",
    ]


def test_validation_images_are_scored_at_each_drawing(runs):
    lines = [json.loads(line) for line in (runs / "sft" / "evaluation" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3]
    assert [line["scorers"]["reward"]["win_rate"] is None for line in lines] == [True, False]
    assert all(len(line["scorers"]["reward"]["images"]) == len(line["prompts"]) for line in lines)


def test_run_folder_has_its_shape(runs):
    run = runs / "sft"
    names = {path.name for path in run.iterdir()} - {"sharding.json"}  # which train_cases.py adds
    assert sorted(names) == [
        "checkpoints", "config.yaml", "deepspeed.json", "environment.json", "evaluation", "log.txt", "metrics.jsonl",
        "samples", "tensorboard",
    ]  # fmt: skip
    assert json.loads((run / "environment.json").read_text())[0]["world_size"] == 2


def test_what_is_printed_is_the_runs_own(runs):
    printed = (runs / "printed_2.txt").read_text()
    own_lines = [line for line in printed.splitlines() if line.strip() and not line.startswith("[20")]
    # a run's own line, on a CPU that has no bf16 of its own
    own_lines = [line for line in own_lines if not line.startswith("warning: this CPU takes")]
    strange = [line for line in own_lines if "Warning" in line or "warning" in line or "it/s" in line]
    assert strange == []


def start(run, *options, kill_after=None):
    """Run train.py alone, as a user does; SIGKILL its process once it has printed a line with `kill_after`."""
    command = [sys.executable, str(ROOT / "ds_dpo" / "train.py"), *arguments(run, **dict(options))]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=run.parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if kill_after is not None and kill_after in line:
            process.kill()
    return process.wait(), "".join(printed)


ALONE = {
    "deepspeed_config": "zero2_fp32_cpu",
    "micro_batch_pairs": 4,
    "cadence.log_every_steps": 1,
    "cadence.save_every_steps": 2,
}


def test_killed_run_goes_on_from_its_newest_checkpoint(runs, tmp_path):
    status, _ = start(tmp_path / "run", *ALONE.items(), kill_after="step_00000004: copied")
    assert status == -9
    status, printed = start(tmp_path / "run", *ALONE.items())
    assert status == 0
    assert "resumed from step 4" in printed or "resumed from step 6" in printed
    assert curve(tmp_path / "run") == curve(runs / "1_rank")
    order = ["importing PyTorch", "opening the pairs", "loading the UNet", "preparing", "looking for a checkpoint"]
    assert [text for line in printed.splitlines() for text in order if text in line] == order
    status, printed = start(tmp_path / "run", *ALONE.items(), ("cadence.sample_every_steps", 5))
    assert status == 0
    assert "validation images of step 10" in printed, "as after a kill between the last save and its images"
    assert (tmp_path / "run" / "samples" / "step_00000010.png").is_file()
    said = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert said[-1].endswith("step 10 of 10: nothing is left to do")
    assert any(" done; export it" in line for line in said)


def test_stop_file_saves_and_ends_and_the_same_command_goes_on(runs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    status, printed = start(tmp_path / "run", *ALONE.items())
    assert status == 0
    assert "stopped at step 1 as asked" in printed
    assert not (tmp_path / "run" / "STOP").exists()
    status, _ = start(tmp_path / "run", *ALONE.items())
    assert status == 0
    assert curve(tmp_path / "run") == curve(runs / "1_rank")
