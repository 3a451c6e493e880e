"""Caches of real processes: makers that are killed, and two ranks."""

import hashlib
import json
import os

import forked
import pytest
from repository import ROOT

pytestmark = pytest.mark.launch
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": str(ROOT),
}
SHARD_PAIRS = 4  # as cache_worker.py has it
# what cache_worker.py asks for, as a command
OPTIONS = [
    *("--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu"),
    *("--data.max_rows", "22", "--data.flip", "shared", "--data.workers", "1"),
]


def run(command, *, ranks=1):
    done = forked.run(command, env=ENVIRONMENT, cwd=ROOT, ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    run(["tests/integration/cache_worker.py", str(folder)])
    return folder


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


def files_of(folder):
    """Every file but the lock, by its content."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_makers_were_killed_at_ten_moments_before_the_cache_was_there(report):
    assert len(report["trials"]) == 10
    assert all(trial["was_killed"] for trial in report["trials"])
    assert sum(not trial["existed"] for trial in report["trials"]) >= 8
    assert len({trial["kill_at"] for trial in report["trials"]}) >= 8


def test_a_killed_and_rerun_cache_is_the_uninterrupted_one_to_the_byte(out, report):
    whole = files_of(out / "whole")
    assert {"cache.json", "pairs.npy", "images.npy", "prompts.npy", "bad_pairs.arrow", "images/00004.arrow"} <= set(
        whole
    )
    for number in range(len(report["trials"])):
        assert files_of(out / f"trial_{number}") == whole, report["trials"][number]


def test_a_rerun_encodes_again_at_most_the_shard_in_flight(report):
    for trial in report["trials"]:
        again = trial["killed"] + trial["rerun"] - report["num_images"]
        assert 0 <= again <= 2 * SHARD_PAIRS, trial
    # and something was left to it, which a maker that begins anew would not do
    assert any(0 < trial["rerun"] < report["num_images"] for trial in report["trials"])


def test_two_ranks_make_the_same_cache_and_one_verifies_it(out, tmp_path):
    program = ["scripts/cache.py", *OPTIONS, "--out", str(tmp_path / "cache")]
    asked = ["--dtype", "fp32", "--shard_pairs", str(SHARD_PAIRS), "--batch", "2"]
    said = run([*program, *asked], ranks=2)
    assert "encoded 42 images in this run, on 2 ranks" in said
    assert files_of(tmp_path / "cache") == files_of(out / "whole")
    said = run([*program, "--verify", "--verify_images", "2"])
    assert "2 pairs encoded again" in said
    assert f"{tmp_path / 'cache'} is complete and undamaged" in said


def losses(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_training_from_the_cache_gives_the_losses_of_online_encoding(out, tmp_path):
    changes = ["--data.prompt_dropout", "0.3", "--data.size_conditioning", "true", "--max_train_steps", "4"]
    quick = ["--pairs_per_step", "4", "--micro_batch_pairs", "2", "--cadence.sample_every_steps", "none"]
    quick += ["--schedule.warmup_steps", "0"]
    cases = [
        [*OPTIONS, *changes, *quick, "--output_dir", str(tmp_path / "online")],
        [*OPTIONS, *changes, *quick, "--output_dir", str(tmp_path / "cached"), "--data.cache", str(out / "whole")],
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run(["tests/integration/train_cases.py", str(tmp_path / "cases.json")])
    online, cached = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert len(online) == 4
    assert online[1:] != [online[0]] * 3  # it trains
    assert cached == pytest.approx(online, abs=1e-4)
