"""Hostfiles: what `deepspeed` would misread or wave through is refused by line."""

import os

import pytest

from ds_dpo.errors import ConfigError
from ds_dpo.launch.hostfile import Host, read_hostfile, select_hosts
from ds_dpo.launch.reach import ssh_command

TWO = [Host(name="a", slots=8, line=1), Host(name="b", slots=4, line=3)]


def test_comments_and_empty_lines_are_passed_over(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=8\n\nb   slots=4  # slower\n# c slots=8\n")
    assert read_hostfile(path) == TWO


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# a slots=8\n", "names no host"),
        ("a slots=8\nb\n", r"line 2: 'b' is not of the form"),
        ("a slots=8 and more\n", "line 1: 'a slots=8 and more' is not of the form"),
        ("a slots=0\n", "line 1: slots=0"),
        ("a slots=x\n", "line 1: slots=x"),
        ("a slots=-1\n", "line 1: slots=-1"),
        ("a slots=8\nb slots=8\na slots=4\n", "line 3: a is already in line 1"),
    ],
)
def test_lines_that_do_not_fit(tmp_path, text, said):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_hostfile(path)


def test_a_missing_file_is_no_wish_for_one_machine(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, {"a": 8, "b": 4}),
        ({"include": "b"}, {"b": 4}),
        ({"include": "a:0,2@b:3"}, {"a": 2, "b": 1}),
        ({"exclude": "a"}, {"b": 4}),
        ({"exclude": "a:0,1,2@b:0"}, {"a": 5, "b": 3}),
        ({"num_nodes": 1}, {"a": 8}),
        ({"num_accelerators": 4}, {"a": 4, "b": 4}),
        ({"num_nodes": 1, "num_accelerators": 8}, {"a": 8}),
    ],
)
def test_what_options_leave(options, left):
    assert {host.name: host.slots for host in select_hosts(TWO, **options)} == left


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include": "a", "exclude": "b"}, "cannot both"),
        ({"include": "a", "num_nodes": 1}, "cannot be combined with"),
        ({"include": "c"}, "host 'c' is not in the hostfile, which has a, b"),
        ({"include": "b:4"}, "b has no slot '4', only 0 to 3"),
        ({"exclude": "b:x"}, "b has no slot 'x'"),
        ({"exclude": "a@b"}, "leaves no host"),
        ({"num_nodes": 3}, "--num_nodes 3: the hostfile has 2"),
        ({"num_accelerators": 8}, "--num_gpus 8: b has 4 slots"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(ConfigError, match=said):
        select_hosts(TWO, **options)


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=id", "me@-oProxyCommand=id", "-l", "a;id", "$(id)", "a`id`", "a|b", "a,b", "x" * 9 + "&"]
)
def test_a_host_that_a_command_would_take_for_an_option_is_refused(tmp_path, name):
    (tmp_path / "hosts").write_text(f"n1 slots=1\n{name} slots=1\n")
    with pytest.raises(ConfigError, match=r"hosts, line 2: .* is not the name or address of a host"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize("name", ["gpu-node-0", "n1.example.org", "10.0.0.1", "me@n1", "fe80::1%eth0", "[::1]", "_n1"])
def test_usual_hosts_are_taken(tmp_path, name):
    (tmp_path / "hosts").write_text(f"{name} slots=2\n")
    assert [host.name for host in read_hostfile(tmp_path / "hosts")] == [name]


def test_options_of_ssh_end_before_the_host(tmp_path):
    command = ssh_command("n1", ssh_port=22, folder=tmp_path, python="python")
    assert command[command.index("n1") - 1] == "--"


def test_a_hostfile_is_a_regular_file_of_short_numbers(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="a named pipe, not a regular file"):
        read_hostfile(tmp_path / "pipe")
    (tmp_path / "hosts").write_text(f"n1 slots={'9' * 5000}\n")
    with pytest.raises(ConfigError, match="must be a number") as refused:
        read_hostfile(tmp_path / "hosts")
    assert len(str(refused.value)) < 500
