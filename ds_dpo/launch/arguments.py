"""Split the command line of `deepspeed` into its own options, the program, and the program's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ds_dpo.config.command_text import command_text
from ds_dpo.config.program_options import user_path
from ds_dpo.errors import ConfigError, shown
from ds_dpo.launch.hostfile import HOST, NOT_A_HOST

DEFAULT_MASTER_PORT = 29500  # DeepSpeed's
TAKING_A_VALUE = (
    "--node_rank",
    "--launcher",
    "--launcher_args",
    "--enable_each_rank_log",
    "--autotuning",
    "--bind_core_list",
    "--venv_script",
    "--log_level",
)
SWITCHES = (
    "--module",
    "--no_python",
    "--no_local_rank",
    "--no_ssh",
    "--no_ssh_check",
    "--force_multi",
    "--save_pid",
    "--bind_cores_to_rank",
)


@dataclass(frozen=True, kw_only=True)
class LaunchCommand:
    """launcher_arguments: the options of `deepspeed` itself. program_arguments: those of the program."""

    launcher_arguments: tuple[str, ...]
    program: str
    program_arguments: tuple[str, ...]
    hostfile: Path | None
    include: str
    exclude: str
    num_nodes: int | None
    num_accelerators: int | None
    master_addr: str | None
    master_port: int
    ssh_port: int | None
    no_ssh: bool
    force_multi: bool


def parse_launch(argv: Sequence[str]) -> LaunchCommand:
    """Read the arguments of `deepspeed` 0.19.8. Raises ConfigError for an unknown option or a missing program.

    Source: deepspeed/launcher/runner.py, parse_args.
    """
    namespace = _parser().parse_args(list(argv))
    if namespace.program is None:
        example = command_text("launch", "--hostfile", "FILE", "train", "--config", "NAME")
        raise ConfigError(f"no program to launch; give one, as in `{example}`")
    if namespace.no_ssh and namespace.node_rank is None:
        raise ConfigError(
            "--no_ssh starts the ranks of this host only and needs the host's number, such as --node_rank 0"
        )
    own = len(argv) - len(namespace.program_arguments) - 1
    whole = str(namespace.hostfile)
    # `deepspeed` opens a path with ~ as it is; of two options it takes the last
    hostfile = () if namespace.hostfile is None or whole in " ".join(argv[:own]) else ("--hostfile", whole)
    return LaunchCommand(
        launcher_arguments=(*argv[:own], *hostfile),
        program=namespace.program,
        program_arguments=tuple(namespace.program_arguments),
        hostfile=namespace.hostfile,
        include=namespace.include,
        exclude=namespace.exclude,
        num_nodes=_count("--num_nodes", namespace.num_nodes),
        num_accelerators=_count("--num_gpus", namespace.num_accelerators),
        master_addr=_host("--master_addr", namespace.master_addr),
        master_port=namespace.master_port,
        ssh_port=namespace.ssh_port,
        no_ssh=namespace.no_ssh,
        force_multi=namespace.force_multi,
    )


def _host(option: str, name: str | None) -> str | None:
    if name is not None and HOST.fullmatch(name) is None:
        raise ConfigError(f"{option} {shown(name)} {NOT_A_HOST}")
    return name


def _count(option: str, value: int) -> int | None:
    if value < -1 or value == 0:
        raise ConfigError(f"{option} {value} must be at least 1")
    return None if value == -1 else value  # -1 is DeepSpeed's default


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-H", "--hostfile", type=user_path)
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("-e", "--exclude", default="")
    parser.add_argument("--num_nodes", type=int, default=-1)
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1, dest="num_accelerators")
    parser.add_argument("--master_addr")
    parser.add_argument("--master_port", type=int, default=DEFAULT_MASTER_PORT)
    parser.add_argument("--ssh_port", type=int)
    for option in TAKING_A_VALUE:
        parser.add_argument(option)
    for option in SWITCHES:
        parser.add_argument(option, action="store_true")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("program", nargs="?")
    parser.add_argument("program_arguments", nargs=argparse.REMAINDER)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; before the program, give options of `deepspeed --help`")
