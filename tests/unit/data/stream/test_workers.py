"""Loader processes ignore signals for the trainer and end with it; the death of one is an error of a later step."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from pair_files import ListedPairs
from repository import SUPPORT
from stream_steps import stream_of

SOURCE = ListedPairs(11)


def worker_pids():
    return {process.pid for process in multiprocessing.active_children()}


def test_workers_ignore_signals_that_are_meant_for_the_trainer():
    before = worker_pids()
    iterator = iter(stream_of(SOURCE, workers=2))
    next(iterator)  # one of the workers may still be starting
    workers = worker_pids() - before
    assert len(workers) == 2
    script = (
        "import os, sys; [os.kill(int(pid), int(number)) for pid in sys.argv[2:] for number in sys.argv[1].split(',')]"
    )
    numbers = ",".join(str(int(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    subprocess.run([sys.executable, "-S", "-c", script, numbers, *map(str, workers)], check=True)
    for _ in range(6):
        next(iterator)
    assert workers <= worker_pids()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


def run_program(script):
    script = textwrap.dedent(script.format(support=str(SUPPORT)))
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


DEAD_WORKER = """
    import multiprocessing, os, signal, sys
    sys.path.insert(0, {support!r})
    from ds_dpo.errors import DataError
    from pair_files import ListedPairs
    from stream_steps import stream_of
    iterator = iter(stream_of(ListedPairs(5), workers=1))
    next(iterator)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet taken note of
    print("still training", flush=True)  # nothing is raised here
    try:
        for _ in range(10):
            next(iterator)
    except DataError as error:
        print(error, flush=True)
"""


@pytest.mark.slow
def test_a_worker_that_died_is_an_error_of_next_and_of_no_other_line():
    lines = run_program(DEAD_WORKER).splitlines()
    assert lines[0] == "still training"
    assert re.fullmatch(
        r"a loader process died \(DataLoader worker \(pid.*\) exited unexpectedly\); usually memory or shared memory "
        r"\(/dev/shm\) was exhausted: lower data.workers, or provide more memory",
        lines[1],
    )
    assert len(lines) == 2


FORKED_AFTER_THREADS = """
    import sys, torch
    sys.path.insert(0, {support!r})
    from pair_files import ListedPairs
    from stream_steps import stream_of
    torch.set_num_threads(2)
    (torch.randn(500, 500) @ torch.randn(500, 500)).sum().item()  # starts OpenMP's threads
    iterator = iter(stream_of(ListedPairs(5), workers=2, resolution=64))
    for _ in range(4):
        next(iterator)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_workers_run_beside_openmp_threads_and_end_with_the_program():
    assert run_program(FORKED_AFTER_THREADS) == "done\n"


def test_another_failure_of_the_loader_is_left_as_it_is(monkeypatch):
    class FailingLoader:
        def __init__(self, *args, **options):
            pass

        def __iter__(self):
            return self

        def __next__(self):
            raise RuntimeError("another failure")

    monkeypatch.setattr("ds_dpo.data.stream.loader.DataLoader", FailingLoader)
    with pytest.raises(RuntimeError, match=r"^another failure$"):
        next(iter(stream_of(SOURCE, workers=1)))
