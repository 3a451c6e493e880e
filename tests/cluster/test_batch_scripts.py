"""What the batch scripts make of a signal and of their ranks' status; a stand-in is the Python of both."""

import sys

import pytest
from slurm_jobs import SCRIPTS, SIZE, Job

# Leaves with STATUS once it is asked to stop, by USR1 or by the file; at once where nobody asks.
# A start after a requeue leaves with 0.
STAND_IN = f"""#!/bin/bash
case $* in *output_dir.py*) exec {sys.executable} "$@" ;; esac
echo "given $*"
echo "start ${{SLURM_RESTART_COUNT:-0}} of ${{SLURM_NNODES}} nodes at $MASTER_ADDR:$MASTER_PORT"
[ ! -e "$RUN/STOP" ] || echo "a STOP file is there: $(cat "$RUN/STOP")"
[ -z "${{SLURM_RESTART_COUNT:-}}" ] || exit 0
asked=
trap 'asked=1' USR1
until [ -n "$asked$AT_ONCE" ] || [ -e "$RUN/STOP" ]; do sleep 0.1; done
exit $STATUS
"""
CASES = {  # asked to stop, status of the ranks: state of the job, starts after the first
    "saved": (True, 0, "COMPLETED", "1"),
    "failed while it stopped": (True, 1, "COMPLETED", "1"),
    "refused": (True, 2, "FAILED", "0"),
    "failed": (False, 1, "FAILED", "0"),
    "done": (False, 0, "COMPLETED", "0"),
}
NODE = ["--nodes=1", "--gpus-per-node=0"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def submit(bench, out):
    """Return a function that gives a case to a script."""
    stand_in = out / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def one(script, name, *options, is_asked, status):
        run = out / f"{script}_{name.replace(' ', '_')}"
        arguments = ["--config=miniature", f"--output_dir={run}"]
        environ = {"PYTHON": stand_in, "STATUS": status, "RUN": run, "AT_ONCE": "" if is_asked else 1}
        environ = {name: str(value) for name, value in {**environ, "RANKS_PER_NODE": 1}.items()}
        return Job(bench, script, run.with_suffix(".out"), arguments, options=[*NODE, *options], environ=environ)

    return one


@pytest.fixture(scope="module")
def jobs(submit):
    """All cases of both scripts, in the queue at the same time, each ended."""
    jobs = {
        (script, name): submit(script, name, is_asked=is_asked, status=status)
        for script in SCRIPTS
        for name, (is_asked, status, *_) in CASES.items()
    }
    # the script's own --signal: USR1 600 s before the end of 1 minute, which is at once
    limited = {script: submit(script, "limited", "--time=1", is_asked=True, status=0) for script in SCRIPTS}
    elsewhere = {script: submit(script, "requeued from elsewhere", is_asked=True, status=1) for script in SCRIPTS}
    for job in elsewhere.values():
        job.wait_until(lambda job=job: "start 0" in job.printed())
        job.requeue()
    for (_, name), job in jobs.items():
        if CASES[name][0]:
            job.wait_until(lambda job=job: "start 0" in job.printed())
            job.preempt()
    for name, others in (("limited", limited), ("requeued from elsewhere", elsewhere)):
        jobs |= {(script, name): job for script, job in others.items()}
    for job in jobs.values():
        job.wait(within=120)
    return jobs


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", CASES)
def test_only_a_job_that_was_asked_and_not_refused_goes_back_into_the_queue(jobs, script, name):
    _, _, state, restarts = CASES[name]
    facts = jobs[script, name].facts()
    assert (facts["JobState"], facts["Restarts"]) == (state, restarts), jobs[script, name].printed()
    if state == "FAILED":
        assert facts["ExitCode"] == f"{CASES[name][1]}:0"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["limited", "requeued from elsewhere"])
def test_the_time_limit_and_slurm_itself_requeue_too(jobs, script, name):
    facts = jobs[script, name].facts()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), jobs[script, name].printed()


def test_jobs_on_a_node_meet_at_ports_of_their_own(jobs):
    ports = [
        line.rpartition(":")[2] for job in jobs.values() for line in job.printed().splitlines() if "start 0" in line
    ]
    assert len(set(ports)) == len(jobs)


def test_only_the_files_that_ask_for_a_requeue_are_removed(jobs, submit, out):
    assert list(out.glob("*/STOP")) == []
    said = {}
    for name, text in (("stale", "a job is to be requeued\n"), ("users", "")):
        run = out / f"train_launcher_{name}"
        run.mkdir()
        (run / "STOP").write_text(text)
        job = submit("train_launcher", name, is_asked=False, status=0)
        job.wait()
        said[name] = "a STOP file is there" in job.printed()
    assert said == {"stale": False, "users": True}


@pytest.mark.parametrize(
    ("argument", "ranks", "said"),
    [("--no_such_option=1", "1", "no_such_option"), ("--seed=1", "", "the number of ranks per node is unknown")],
)
def test_what_the_launcher_script_cannot_tell_ends_it_before_it_starts_ranks(bench, tmp_path, argument, ranks, said):
    printed = tmp_path / "printed"
    arguments = ["--config=miniature", f"--output_dir={tmp_path / 'run'}", argument]
    job = Job(bench, "train_launcher", printed, arguments, options=NODE, environ={"RANKS_PER_NODE": ranks})
    facts = job.wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
    assert said in printed.read_text()
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_an_array_of_runs_with_folders_and_ports_of_their_own(bench, submit, out):
    options = [*SIZE, *NODE, "--wait", f"--output={out / 'sweep_%a.out'}"]
    environ = {
        "PYTHON": str(out / "python"),
        "STATUS": "0",
        "RUN": "",
        "AT_ONCE": "1",
        "SRUN_OPTIONS": "--label --immediate=60",
    }
    bench.check("head", "sbatch", *options, "scripts/slurm/sweep.sbatch", "--config=miniature", environ=environ)
    printed = [path.read_text() for path in sorted(out.glob("sweep_*.out"))]
    given = [line.split() for text in printed for line in text.splitlines() if line.startswith("0: given ")]
    assert [words[words.index("--beta") + 1] for words in given] == ["1000", "2000", "5000", "10000"]
    assert len({words[words.index("--output_dir") + 1] for words in given}) == 4
    assert all("--config=miniature" in words for words in given)
    assert len({line for text in printed for line in text.splitlines() if line.startswith("0: start 0")}) == 4
