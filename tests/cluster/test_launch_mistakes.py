"""Every mistake of a launch over hosts, made on real ones: named by line or host in half a minute, nothing left."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from two_hosts import ENVIRONMENT, ROOT

GOOD = "n1 slots=1\nn2 slots=1\n"
SECONDS = 30
PORT_IN_USE = "29777"

# name: (hostfile, options of the launcher, options of the program, what the message must name)
MISTAKES = {
    "second name wrong": ("n1 slots=1\nnosuch slots=1\n", [], {}, ["nosuch (line 2)"]),
    "first name wrong": ("# two hosts\nnosuch slots=1\nn2 slots=1\n", [], {}, ["nosuch (line 2)"]),
    "both names wrong": ("nosuch slots=1\nnorthis slots=1\n", [], {}, ["nosuch (line 1)", "northis (line 2)"]),
    "second unreachable": ("n1 slots=1\n10.77.0.99 slots=1\n", [], {}, ["10.77.0.99 (line 2)"]),
    "first unreachable": ("10.77.0.99 slots=1\nn2 slots=1\n", [], {}, ["10.77.0.99 (line 1)"]),
    "no sshd at that port": (GOOD, ["--ssh_port", "2299"], {}, ["n1 (line 1)", "n2 (line 2)", "2299"]),
    "slots is no number": ("n1 slots=x\n", [], {}, ["line 1", "slots=x"]),
    "no slots": ("n1 slots=1\nn2\n", [], {}, ["line 2", "'n2'"]),
    "slots of 0": ("n1 slots=0\nn2 slots=0\n", [], {}, ["line 1", "slots=0"]),
    "a host twice": ("n1 slots=1\nn1 slots=1\n", [], {}, ["line 2", "n1"]),
    "an empty file": ("", [], {}, ["names no host"]),
    "a missing file": (None, [], {}, ["hosts", "cannot be read"]),
    "a missing file and two nodes": (None, ["--num_nodes", "2"], {}, ["hosts", "cannot be read"]),
    "more nodes than hosts": (GOOD, ["--num_nodes", "3"], {}, ["--num_nodes 3", "has 2"]),
    "a host included that is not there": (GOOD, ["--include", "n3"], {}, ["'n3'", "n1, n2"]),
    "a slot included that is not there": (GOOD, ["--include", "n1:5"], {}, ["'5'", "n1"]),
    "one host, another one": ("n1 slots=1\n", [], {}, ["n1", "not this machine"]),
    "no rank of this node": (GOOD, ["--no_ssh", "--master_addr", "10.77.0.11"], {}, ["--node_rank"]),
    "a port in use": (GOOD, ["--master_port", PORT_IN_USE], {}, ["n1", "--master_port"]),
    "a folder of one host": (GOOD, [], {"output_dir": "/dev/shm/run"}, ["n1", "n2", "/dev/shm/run"]),
    "a configuration of one host": (GOOD, [], {"config": "/run/own.yaml"}, ["n1", "n2", "/run/own.yaml"]),
    "another world size": (GOOD, [], {"expected_world_size": 4}, ["expected_world_size is 4", "2 ranks"]),
    "a mistyped option": (GOOD, [], {"lerning_rate": 1}, ["lerning_rate"]),
}

# The same under plain `deepspeed`, where ranks run: those say it. It sees no mistake in a missing file or in more nodes
# than hosts, and neither do ranks that are not told how many they should be.
PLAIN_MISTAKES = {
    "second name wrong": ("n1 slots=1\nnosuch slots=1\n", [], {}, ["1 (nosuch) did not come to 10.77.0.11"]),
    "second unreachable": ("n1 slots=1\n10.77.0.99 slots=1\n", [], {}, ["1 (10.77.0.99) did not come"]),
    "a missing file": (None, [], {"expected_world_size": 2}, ["expected_world_size is 2", "1 rank"]),
    "more nodes than hosts": (GOOD, ["--num_nodes", "3"], {"expected_world_size": 3}, ["expected_world_size is 3"]),
    "a port in use": (GOOD, ["--master_port", PORT_IN_USE], {}, ["rank 0 on n1", PORT_IN_USE, "--master_port"]),
    "a folder of one host": (GOOD, [], {"output_dir": "/dev/shm/run"}, ["n2", "what n1 wrote into /dev/shm/run"]),
    "a configuration of one host": (GOOD, [], {"config": "/run/of_n1.yaml"}, ["(rank 1)", "/run/of_n1.yaml"]),
    "a mistyped option": (GOOD, [], {"lerning_rate": 1}, ["lerning_rate"]),
}
PLAIN_LAUNCHER = (sys.executable, "-m", "deepspeed.launcher.runner")
PLAIN_PORTS = 29800  # of launches at the same time, one each


def make(bench, folder, hostfile, launcher_options, settings, *, launcher=(sys.executable, "scripts/launch.py")):
    """Start a launch from head; return its status, its seconds, what it said and where its run would be."""
    folder.mkdir()
    if hostfile is not None:
        (folder / "hosts").write_text(hostfile)
    command = [*launcher, "--hostfile", folder / "hosts", *launcher_options, "ds_dpo/train.py"]
    given = {"config": "miniature", "deepspeed_config": "zero2_fp32_cpu", "output_dir": folder / "run", **settings}
    given.setdefault("max_train_steps", 1)  # where nothing is noticed
    began = time.monotonic()
    # a plain `deepspeed` lets none of this travel
    travels = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PATH")
    (folder / "environment").write_text("".join(f"{name}={ENVIRONMENT[name]}\n" for name in travels))
    done = bench.run(
        "head",
        *command,
        *(f"--{name}={value}" for name, value in given.items()),
        environ={"DS_ENV_FILE": str(folder / "environment")},
    )
    return done.returncode, time.monotonic() - began, done.stdout, Path(given["output_dir"])


@contextmanager
def port_in_use(bench):
    """Let n1 listen there, and never answer."""
    listening = (
        f"import socket, sys; s = socket.create_server(('', {PORT_IN_USE})); print(flush=True); sys.stdin.read()"
    )
    command = bench.command("n1", sys.executable, "-c", listening)
    with subprocess.Popen(command, env=bench.environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holds_port:
        assert holds_port.stdout is not None
        holds_port.stdout.readline()
        yield
        holds_port.communicate()  # it listens until its input ends


@pytest.fixture(scope="module")
def made(bench, tmp_path_factory):
    """What became of each mistake. They are made two at a time, since most of each is waiting."""
    out = tmp_path_factory.mktemp("mistakes")
    bench.check("head", "sh", "-c", "echo 'base: miniature' > /run/own.yaml")
    with port_in_use(bench), ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(make, bench, out / name.replace(" ", "_"), *mistake)
            for name, (*mistake, _) in MISTAKES.items()
        }
    return {name: future.result() for name, future in started.items()}


@pytest.fixture(scope="module")
def made_plainly(bench, tmp_path_factory):
    """The same under plain `deepspeed`."""
    out = tmp_path_factory.mktemp("plain_mistakes")
    bench.check("n1", "sh", "-c", "echo 'base: miniature' > /run/of_n1.yaml")
    with port_in_use(bench), ThreadPoolExecutor(2) as pool:
        started = {}
        for port, (name, (hostfile, options, settings, _)) in enumerate(PLAIN_MISTAKES.items(), start=PLAIN_PORTS):
            folder, own = out / name.replace(" ", "_"), ["--master_port", str(port)]
            mistake = (hostfile, [*own, *options], settings)
            started[name] = pool.submit(make, bench, folder, *mistake, launcher=PLAIN_LAUNCHER)
    return {name: future.result() for name, future in started.items()}


def require_told(made, words):
    status, seconds, said, run = made
    assert status == 2, said
    assert [word for word in words if word not in said] == [], said
    assert seconds < SECONDS
    assert not run.exists()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_in_time(made, name):
    require_told(made[name], MISTAKES[name][-1])


def require_told_plainly(made, words):
    """No time: DeepSpeed's launchers take most of it."""
    status, _, said, run = made
    assert status != 0, said
    assert [word for word in words if word not in said] == [], said
    assert "Traceback" not in said, said
    assert not run.exists()


@pytest.mark.parametrize("name", PLAIN_MISTAKES)
def test_a_mistake_under_plain_deepspeed_is_named_by_a_rank(made_plainly, name):
    require_told_plainly(made_plainly[name], PLAIN_MISTAKES[name][-1])


def test_no_mistake_leaves_a_process(made, made_plainly, bench):
    bench.require_quiet()


@contextmanager
def laid_over(bench, host, path, text):
    """Let one host alone see another text in a file of the shared disk."""
    bench.check(host, "sh", "-c", 'printf "%s" "$1" > "$2"', "sh", text, f"/run/{path.name}")
    bench.check(host, "mount", "--bind", f"/run/{path.name}", path)
    try:
        yield
    finally:
        bench.check(host, "umount", path)


def test_a_host_of_other_versions_and_other_code_is_named(bench, tmp_path):
    torch = Path(str(distribution("torch").locate_file(f"torch-{version('torch')}.dist-info"))) / "METADATA"
    code = ROOT / "ds_dpo" / "batch.py"
    with laid_over(bench, "n2", torch, "Name: torch\nVersion: 9.9\n"), laid_over(bench, "n2", code, "pass\n"):
        made = make(bench, tmp_path / "other", GOOD, [], {})
        plainly = make(bench, tmp_path / "plainly", GOOD, [], {}, launcher=PLAIN_LAUNCHER)
    words = [f"n2 has torch 9.9, n1 {version('torch')}", "n2 has code"]
    require_told(made, words)
    require_told_plainly(plainly, words)


def test_a_host_without_this_python_is_named(bench, tmp_path):
    bench.check("n2", "mount", "-t", "tmpfs", "tmpfs", Path(sys.executable).parent)
    try:
        made = make(bench, tmp_path / "other", GOOD, [], {})
    finally:
        bench.check("n2", "umount", Path(sys.executable).parent)
    require_told(made, ["n2 (line 2)", sys.executable])
