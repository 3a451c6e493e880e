"""What hosts say of themselves, what is made of it, and that a start which is refused leaves nothing behind."""

import json
import os
import socket
import subprocess
import sys

import pytest
from repository import ROOT

from ds_dpo.errors import ConfigError
from ds_dpo.launch.checks import is_this_machine, require_sound_hosts
from ds_dpo.launch.hostfile import Host
from ds_dpo.launch.prepare import prepare_launch
from ds_dpo.launch.reach import Answer
from ds_dpo.launch.report import ALIKE, Report, code_fingerprint, num_gpus_here

TRAIN = str(ROOT / "ds_dpo" / "train.py")


def answer(name, *, slots=8, problem=None, versions=None, **changes):
    host = Host(name=name, slots=slots, line=1)
    if problem is not None:
        return Answer(host=host, report=None, problem=problem)
    told = {
        "hostname": name,
        "versions": {**dict.fromkeys(ALIKE, "1"), **(versions or {})},
        "num_gpus": 8,
        "token": "t",
        "listen_error": None,
        "error": None,
        **changes,
    }
    return Answer(host=host, report=Report(**told), problem=None)


def check(*answers, needs_gpus=True):
    require_sound_hosts(answers, token="t", output_dir="runs/x", needs_gpus=needs_gpus)


def test_the_gpus_of_a_host_are_counted_and_none_is_zero(tmp_path):
    assert num_gpus_here(tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert num_gpus_here(tmp_path) == 3
    (tmp_path / "of_amd").mkdir()
    (tmp_path / "of_amd" / "kfd").touch()
    assert num_gpus_here(tmp_path / "of_amd") is None


def test_alike_hosts_are_sound():
    check(answer("a"), answer("b"))
    check(answer("a", num_gpus=None), answer("b", num_gpus=None))
    check(answer("a", slots=9), needs_gpus=False)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (answer("b", problem="no answer within 28 s"), r"b \(line 1\): no answer"),
        (answer("b", versions={"torch": "2"}), "b has torch 2, a 1"),
        (answer("b", versions={"code": "2"}), "b has code 2, a 1"),
        (answer("b", versions={"config": "2"}), "b has config 2, a 1"),
        (answer("b", versions={"deepspeed": "not installed"}), "b: deepspeed is not installed"),
        (answer("b", token=None), "b: cannot read what this machine wrote into runs/x"),
        (answer("b", token="of another launch"), "b: cannot read"),
        (answer("b", listen_error="Address already in use"), "b: cannot listen at the port .* another --master_port"),
        (answer("b", slots=9), "b: slots=9, but the host has 8 GPUs"),
        (answer("b", num_gpus=0), "b: it has no GPU .*check its driver, or set DS_ACCELERATOR=cpu"),
        (answer("b", error="objective.beta = x: no number"), "b: objective.beta = x"),
    ],
)
def test_each_that_is_not_is_named(bad, said):
    with pytest.raises(ConfigError, match=said):
        check(answer("a"), bad)


def test_all_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        check(answer("a", token=None), answer("b", slots=9), answer("c", problem="status 255: refused"))
    assert [word in str(caught.value) for word in ("a: cannot read", "b: slots=9", "c (line 1): status 255")] == [
        True
    ] * 3


def test_a_host_reports_without_torch(tmp_path):
    token = tmp_path / "token"
    token.write_text("t")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        request = {
            "program_arguments": ["--config", "miniature"],
            "token_file": str(token),
            "listens": taken.getsockname()[1],
        }
        program = "import sys, runpy; runpy.run_module('ds_dpo.launch.report', run_name='__main__'); "
        program += "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
    found = Report(**json.loads(done.stdout))
    assert set(found.versions) == set(ALIKE)
    assert (found.token, found.error, found.listen_error) == ("t", None, "Address already in use")


def test_code_that_was_edited_is_other_code(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = code_fingerprint(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert code_fingerprint(tmp_path) != before


def test_this_machine_is_known_by_any_of_its_names():
    assert is_this_machine("localhost")
    assert not is_this_machine("192.0.2.1"), "an address of documentation, which no machine has"
    assert not is_this_machine("no-such-host.invalid")


def test_a_launch_here_is_ready_to_run(tmp_path):
    out = tmp_path / "run"
    port = free_port()
    prepared = prepare_launch(
        ["--num_gpus", "2", "--master_port", str(port), TRAIN, "--config", "miniature", f"--output_dir={out}"],
        {"PATH": "/bin", "HF_TOKEN": "hf_abc", "HOME": str(tmp_path)},
    )
    assert prepared.command[-2:] == ["--expected_world_size", "2"]
    assert prepared.command[3:7] == ["--num_gpus", "2", "--master_port", str(port)]
    assert prepared.environ["DS_ENV_FILE"] == str(out / "launch.env")
    assert "hf_abc" not in (out / "launch.env").read_text()
    assert prepared.remarks == ["HF_TOKEN are not passed to other hosts: they look like secrets"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ds_dpo/trian.py"], "no such file"),
        ([str(ROOT / "scripts" / "launch.py")], "launches only ds_dpo/train.py"),
        (["--hostfile", "nowhere", TRAIN], "--hostfile nowhere"),
        (["--num_nodes", "2", TRAIN], "--num_nodes 2 needs --hostfile"),
        ([TRAIN, "--config", "miniature", "--beta", "x"], "objective.beta = x"),
    ],
)
def test_a_launch_that_does_not_fit_leaves_nothing(tmp_path, argv, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        prepare_launch(argv, dict(os.environ))
    assert list(tmp_path.iterdir()) == []


def test_hosts_that_do_not_answer_leave_no_run_folder(tmp_path, monkeypatch):
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text("#!/bin/sh\necho 'Connection refused' >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n")
    out = tmp_path / "runs" / "x"
    with pytest.raises(ConfigError, match=r"a \(line 1\): status 255: Connection refused\n  b \(line 2\)"):
        prepare_launch(
            ["--hostfile", str(hosts), TRAIN, "--config", "miniature", f"--output_dir={out}"], dict(os.environ)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "hosts"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
