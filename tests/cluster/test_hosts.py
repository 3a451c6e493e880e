"""Training over two hosts, by a hostfile and by both batch scripts: stopped, requeued, and the same to the last bit.

One uninterrupted run by hostfile and one preempted run of each script go on at the same time; the tests look at what
they left, and at what is left of them on the hosts.
"""

import json
import subprocess
import sys

import pytest
from slurm_jobs import SCRIPTS, Job
from two_hosts import NODES, ROOT

pytestmark = pytest.mark.launch
STEPS = 14
STOPPED_AFTER = 3  # lines of metrics.jsonl; a signal takes a second, and a step a third
SETTINGS = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "pairs_per_step": 4,
    "micro_batch_pairs": 2,
    "max_train_steps": STEPS,
    "schedule.warmup_steps": 2,
    "cadence.save_every_steps": 1000,
    "cadence.sample_every_steps": "none",
}
TIMED = {"pairs_per_second", "step_seconds", "data_seconds", "peak_memory_gib"}


def arguments(output_dir):
    return [f"--{name}={value}" for name, value in {**SETTINGS, "output_dir": output_dir}.items()]


def metrics(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(run):
    """All that is computed in each step, by name."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in metrics(run)]


def ranks_on(bench, host, output_dir):
    """The pids of a run's ranks on a host, as the host counts."""
    found = [line.split() for line in bench.left_over(host)]
    named = f"--output_dir={output_dir}"
    return [words[0] for words in found if words[2:4] == ["-u", "ds_dpo/train.py"] and named in words]


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    """The folder of all runs, and the jobs by script, each ended."""
    out = tmp_path_factory.mktemp("runs")
    (out / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    command = [sys.executable, "scripts/launch.py", "--hostfile", out / "hosts", "ds_dpo/train.py"]
    whole = subprocess.Popen(
        bench.command("head", *command, *arguments(out / "hostfile")),
        env=bench.environ(),
        cwd=ROOT,
        stdout=(out / "hostfile.out").open("w"),
        stderr=subprocess.STDOUT,
    )
    jobs = {script: Job(bench, script, out / f"{script}.out", arguments(out / script)) for script in SCRIPTS}
    for script, job in jobs.items():
        job.wait_until(lambda run=out / script: len(metrics(run)) >= STOPPED_AFTER)
        job.preempt()
    assert whole.wait(600) == 0, (out / "hostfile.out").read_text()[-3000:]
    for job in jobs.values():
        job.wait()
    return out, jobs


def test_two_hosts_of_a_hostfile_train_and_nothing_is_left_running(runs, bench):
    out, _ = runs
    assert [line["step"] for line in metrics(out / "hostfile")] == list(range(1, STEPS + 1))
    assert json.loads((out / "hostfile" / "environment.json").read_text())[-1]["world_size"] == 2
    bench.require_quiet()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_preempted_job_goes_on_and_its_curve_is_the_uninterrupted_one_to_the_bit(runs, script):
    out, jobs = runs
    facts = jobs[script].wait()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), jobs[script].printed()[-3000:]
    printed = jobs[script].printed()
    assert printed.count("as asked; the same command resumes from there") == 1
    assert printed.count("resumed from step ") == 1
    assert curve(out / script) == curve(out / "hostfile")
    losses = [line["loss"] for line in curve(out / script)]
    assert max(losses) - min(losses) > 0.01, "a curve that does not move compares nothing"
    assert not (out / script / "STOP").exists()


@pytest.mark.parametrize("event", ["rank killed", "cancelled"])
def test_a_job_that_is_ended_is_not_requeued_and_nothing_is_left_of_it(bench, tmp_path, event):
    runs = {script: tmp_path / script for script in SCRIPTS}
    jobs = {script: Job(bench, script, tmp_path / f"{script}.out", arguments(runs[script])) for script in SCRIPTS}
    for script, job in jobs.items():
        job.wait_until(lambda run=runs[script]: all(ranks_on(bench, host, run) for host in NODES))
        if event == "cancelled":
            if script == "train_launcher":  # a signal that is meant for ranks does not part launchers from them
                job.signal_steps()
                assert len([line for line in bench.left_over("n1") if "deepspeed.launcher.launch" in line]) == 1
            job.cancel()
        else:
            bench.check("n2", "kill", "-KILL", *ranks_on(bench, "n2", runs[script]))
    for job in jobs.values():
        facts = job.wait(within=60)
        assert facts["JobState"] == ("CANCELLED" if event == "cancelled" else "FAILED"), job.printed()[-3000:]
        assert facts["Restarts"] == "0"
        assert facts["ExitCode"] != "0:0"
    bench.require_quiet()
