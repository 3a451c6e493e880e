"""The bench itself: its hosts are hosts, and two benches on one machine know nothing of each other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_hosts import HERE, HOSTS, NODES, Bench


@pytest.fixture
def second_bench(bench):
    second = Bench()
    try:
        second.start()
        yield second
    finally:
        second.stop()


def test_hosts_reach_each_other_and_have_processes_and_memory_of_their_own(bench):
    assert bench.check("head", "ssh", "n1", "ssh", "n2", "hostname").strip() == "n2"
    assert sorted(bench.check("head", "srun", "--nodes=2", "hostname").split()) == list(NODES)
    bench.check("n1", "touch", "/dev/shm/mark")
    assert bench.run("n2", "ls", "/dev/shm/mark").returncode != 0
    assert "unreachable" in bench.run("n2", "ip", "route", "get", "192.0.2.1").stdout, "nothing leaves the bench"


def test_two_benches_at_a_time_are_apart(bench, second_bench):
    sleeper = subprocess.Popen(second_bench.command("n1", "sleep", "600"), env=second_bench.environ())
    with sleeper:
        while not second_bench.left_over("n1"):
            assert sleeper.poll() is None
        assert bench.left_over("n1") == []
        os.kill(second_bench.first_process("n1"), signal.SIGKILL)
        assert sleeper.wait() != 0
    assert bench.check("head", "ssh", "n1", "hostname").strip() == "n1"
    second_bench.start()  # what is down is brought up again
    assert second_bench.check("head", "ssh", "n1", "hostname").strip() == "n1"
    second_bench.require_quiet()


def test_a_bench_ends_with_the_process_that_started_it(bench, tmp_path):
    program = f"import sys; sys.path.insert(0, {str(HERE)!r}); from two_hosts import Bench; "
    program += f"bench = Bench({str(tmp_path)!r}); bench.start(); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        hosts = {Path(f"/proc/{Bench(tmp_path).first_process(host)}") for host in HOSTS}
        assert all(host.exists() for host in hosts)
        owner.kill()
    until = time.monotonic() + 60
    while any(host.exists() for host in hosts):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_user_who_is_not_root_is_told_so(tmp_path):
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DSC_DIR": str(tmp_path / "state")}
    done = subprocess.run([HERE / "bench" / "start-cluster"], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (77, "start-cluster: it needs root\n")
    assert not (tmp_path / "state").exists()
