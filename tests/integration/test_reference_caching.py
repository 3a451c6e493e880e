"""Reference caches of real processes: makers that are killed, two ranks, and training from them."""

import hashlib
import json
import math
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
# as reference_cache_worker.py has them
SHARD_PAIRS, BATCH_PAIRS, STEPS = 4, 3, 20
OPTIONS = [
    *("--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu", "--data.max_rows", "22"),
    *("--pairs_per_step", "4", "--cadence.sample_every_steps", "none"),
    *("--schedule.warmup_steps", "0", "--schedule.decay_steps", "100", "--data.prompt_dropout", "0.2"),
]


def run(command, *, ranks=1):
    done = forked.run(command, env=ENVIRONMENT, cwd=ROOT, ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference_caches")
    run(["tests/integration/reference_cache_worker.py", str(folder)])
    return folder


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


def files_of(folder):
    """Every file but the lock, by its content."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_killed_and_rerun_cache_is_the_uninterrupted_one_to_the_byte(out, report):
    assert all(trial["was_killed"] for trial in report["trials"])
    assert sum(not trial["existed"] for trial in report["trials"]) >= 6
    assert len({trial["kill_at"] for trial in report["trials"]}) >= 6
    whole = files_of(out / "whole")
    assert set(whole) == {"reference.json", "errors_20.npy"}
    for number, trial in enumerate(report["trials"]):
        assert files_of(out / f"trial_{number}") == whole, trial


def test_a_rerun_computes_again_at_most_the_shard_in_flight(report):
    for trial in report["trials"]:
        assert 0 <= trial["killed"] + trial["rerun"] - report["num_pairs"] <= SHARD_PAIRS, trial
    # and something was left to it, which a maker that begins anew would not do
    assert any(0 < trial["rerun"] < report["num_pairs"] for trial in report["trials"])


def test_two_ranks_make_at_once_what_one_rank_made_in_two_parts(out, tmp_path):
    program = ["scripts/cache.py", "--reference", *OPTIONS, "--max_train_steps", str(STEPS)]
    program += ["--out", str(tmp_path / "cache"), "--micro_batch_pairs", "1", "--data.workers", "1"]
    asked = ["--shard_pairs", str(SHARD_PAIRS), "--batch", str(BATCH_PAIRS)]
    said = run([*program, *asked], ranks=2)
    assert "computed 80 pair visits in this run, on 2 ranks" in said
    assert files_of(tmp_path / "cache") == files_of(out / "extended")
    said = run([*program, "--verify", "--verify_images", "3"])
    assert "3 pair visits computed again" in said
    assert f"{tmp_path / 'cache'} is complete and undamaged" in said


def test_what_is_read_are_the_errors_of_the_reference(report):
    direct = report["direct"]
    assert direct["places"] == 27
    assert direct["visits"] >= 3
    # beside other images last bits differ: fp32 keeps 24 bits
    assert direct["relative_difference"] < 1e-5


def losses(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_twenty_steps_are_those_with_a_reference_in_memory(out):
    replicated, cached = losses(out / "replicated"), losses(out / "cached")
    assert len(replicated) == STEPS
    assert max(replicated) - min(replicated) > 0.05, "it trains"
    assert cached[0] == pytest.approx(math.log(2), abs=1e-4)
    assert cached == pytest.approx(replicated, abs=1e-4)
    said = (out / "cached" / "log.txt").read_text()
    assert "step 20/20" in said


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_trained(out, report):
    refused = report["refused"]
    assert refused["longer"].startswith("ConfigError")
    for said in ("lacks 40 of the 120", "max_train_steps 30", "--visits 6", "train with max_train_steps 20"):
        assert said in refused["longer"]
    assert refused["stale"].startswith("ConfigError")
    for said in ("seed: the cache has 0, this run 1", 'data.flip: the cache has "off", this run "shared"'):
        assert said in refused["stale"]
    assert refused["altered"].startswith("PreflightError")
    assert "reference.cache differ from those of the policy by a share of up to 0.02" in refused["altered"]
    assert refused["pairs"].startswith("DataError")
    for name in ("longer", "stale", "altered_run", "pairs"):
        assert not (out / name).exists()
