"""The command line of `deepspeed` is read as DeepSpeed reads it."""

from pathlib import Path

import pytest

from ds_dpo.errors import ConfigError
from ds_dpo.launch import arguments
from ds_dpo.launch.arguments import parse_launch


def test_the_program_s_arguments_are_its_own():
    launch = parse_launch(
        ["--hostfile", "h", "--num_nodes=2", "-q", "ds_dpo/train.py", "--config", "x", "--include", "y", "--num_gpus=9"]
    )
    assert launch.launcher_arguments == ("--hostfile", "h", "--num_nodes=2", "-q")
    assert launch.program == "ds_dpo/train.py"
    assert launch.program_arguments == ("--config", "x", "--include", "y", "--num_gpus=9")
    assert (launch.hostfile, launch.num_nodes, launch.include) == (Path("h"), 2, "")
    assert launch.num_accelerators is None


def test_every_option_of_this_deepspeed_is_known():
    """An option that DeepSpeed adds would be taken for the program."""
    text = (Path(__import__("deepspeed").__file__).parent / "launcher" / "runner.py").read_text()
    body = text[text.index("def parse_args") : text.index("def _parse_hostfile")]
    options = {
        word.strip("\"'") for word in body.replace(",", " ").replace("(", " ").split() if word[:2] in ('"-', "'-")
    }
    known = set(arguments._parser()._option_string_actions)
    assert len(options) > 25
    assert options - known == set()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--hostfile", "h"], "no program"),
        (["--hostfil", "h", "train.py"], "--hostfil"),
        (["--num_nodes", "0", "train.py"], "--num_nodes 0"),
        (["--num_gpus", "-3", "train.py"], "--num_gpus -3"),
        (["--master_port", "x", "train.py"], "master_port"),
        (["--no_ssh", "train.py"], "--node_rank"),
    ],
)
def test_arguments_that_do_not_fit(argv, said):
    with pytest.raises(ConfigError, match=said):
        parse_launch(argv)


@pytest.mark.parametrize("name", ["-oProxyCommand=id", "-l", "a b", "$(id)", ""])
def test_an_address_that_a_command_would_take_for_an_option_is_refused(name):
    with pytest.raises(ConfigError, match=r"--master_addr '.*' is not the name or address of a host"):
        parse_launch([f"--master_addr={name}", "train"])
    assert parse_launch(["--master_addr=fe80::1", "train"]).master_addr == "fe80::1"
