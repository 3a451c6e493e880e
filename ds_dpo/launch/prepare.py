"""Turn a command line of `deepspeed` into one that can run: check the hosts, and write the environment of the ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_dpo.config.asset_paths import PACKAGE
from ds_dpo.config.base import home
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError
from ds_dpo.launch.arguments import LaunchCommand, parse_launch
from ds_dpo.launch.checks import is_this_machine, require_sound_hosts
from ds_dpo.launch.earlier import end_earlier_launches
from ds_dpo.launch.hostfile import Host, read_hostfile, select_hosts
from ds_dpo.launch.reach import ask_hosts
from ds_dpo.launch.report import Request, listen_error
from ds_dpo.launch.shared_folder import token_in
from ds_dpo.launch.travel import read_usual_file, travelling_environment, write_environment_file
from ds_dpo.process import fault_points
from ds_dpo.process.departure import say
from ds_dpo.supervision.lease import LEASE_VARIABLE, Lease
from ds_dpo.supervision.run_lock import LOCK_VARIABLE, STALE_SECONDS, RunLock

ENVIRONMENT_FILE = "launch.env"
TRAIN = ("ds_dpo", "train.py")
# what an installed user, who has no checkout, gives instead of the program's path
TRAIN_WORD = "train"
# ssh notices a host that is cut off within 20 s instead of when TCP gives up; the user's own options come first and win
SSH_OPTIONS = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """command, environ: to run. world_size: ranks that must start, None if it is not known.

    lease: the lease that the ranks watch and that the launcher renews. lock: of the run folder, which it holds
    until rank 0 takes it over; None if there is a launcher on each host.
    """

    command: list[str]
    environ: dict[str, str]
    lease: Lease
    world_size: int | None
    remarks: list[str]
    lock: RunLock | None = None


def prepare_launch(argv: Sequence[str], environ: Mapping[str, str]) -> Prepared:
    """Check all that can be checked before anything runs; takes half a minute at most.

    Raises ConfigError that names each wrong line, option or host.
    """
    say("launch: checking the command line, the configuration and the hosts")
    launch = parse_launch(argv)
    if launch.program == TRAIN_WORD:
        launch = replace(launch, program=str(PACKAGE / TRAIN[-1]))
    program = Path(launch.program)
    if not program.is_file():
        raise ConfigError(f"program {program}: no such file")
    if program.parts[-2:] != TRAIN:
        raise ConfigError(
            f"program {program}: this launches only ds_dpo/train.py; start other programs with `deepspeed`"
        )
    loaded = load_config(launch.program_arguments)
    output_dir = Path(loaded.config.output_dir)
    if launch.no_ssh:  # there is a launcher on each host, and each has its own lease for the same run
        return _check(launch, loaded.config, environ)
    remarks = end_earlier_launches(output_dir)
    lock = RunLock(output_dir, say=say)
    lock.take(patience_seconds=STALE_SECONDS if remarks else 0.0)  # ranks that must exit take some seconds
    try:
        prepared = _check(launch, loaded.config, {**environ, LOCK_VARIABLE: lock.nonce})
    except BaseException:
        lock.release()
        raise
    return replace(prepared, remarks=remarks + prepared.remarks, lock=lock)


def _check(launch: LaunchCommand, config: RunConfig, environ: Mapping[str, str]) -> Prepared:
    output_dir = Path(config.output_dir)
    if launch.hostfile is None:
        return _on_this_machine(launch, output_dir, environ)
    hosts = select_hosts(
        read_hostfile(launch.hostfile),
        include=launch.include,
        exclude=launch.exclude,
        num_nodes=launch.num_nodes,
        num_accelerators=launch.num_accelerators,
    )
    world_size = sum(host.slots for host in hosts)
    stated = config.expected_world_size
    if stated not in (None, world_size):
        raise ConfigError(f"expected_world_size is {stated}, but the hostfile and the options give {world_size} ranks")
    is_here = len(hosts) == 1 and not launch.force_multi
    if is_here and not is_this_machine(hosts[0].name):
        raise ConfigError(
            f"{launch.hostfile} selects one host, {hosts[0].name}, which is not this machine; `deepspeed` would still "
            "train on this machine: start on that host, or give --force_multi"
        )
    if not is_here and not launch.no_ssh:
        _ask(hosts, launch, output_dir, environ)
    return _prepared(launch, output_dir, environ, world_size=world_size)


def _on_this_machine(launch: LaunchCommand, output_dir: Path, environ: Mapping[str, str]) -> Prepared:
    for option, value in (("--include", launch.include), ("--num_nodes", launch.num_nodes)):
        if value:
            raise ConfigError(f"{option} {value} needs --hostfile")
    problem = listen_error(launch.master_port)
    if problem is not None:
        raise ConfigError(f"--master_port {launch.master_port} cannot be used ({problem}); give another port")
    return _prepared(launch, output_dir, environ, world_size=launch.num_accelerators)


def _ask(hosts: Sequence[Host], launch: LaunchCommand, output_dir: Path, environ: Mapping[str, str]) -> None:
    with token_in(output_dir) as token:
        requests = [
            Request(
                program_arguments=launch.program_arguments,
                token_file=str(token.path),
                listens=launch.master_port if place == 0 else None,  # ranks meet on the first host
            )
            for place in range(len(hosts))
        ]
        answers = ask_hosts(hosts, requests, ssh_port=launch.ssh_port)
    require_sound_hosts(
        answers, token=token.text, output_dir=str(output_dir), needs_gpus=environ.get("DS_ACCELERATOR") != "cpu"
    )


def _prepared(
    launch: LaunchCommand, output_dir: Path, environ: Mapping[str, str], *, world_size: int | None
) -> Prepared:
    try:
        lease = Lease(output_dir)
    except OSError as error:
        raise ConfigError(f"output_dir {output_dir} cannot be written ({error.strerror})") from error
    environ = {
        **environ,
        LEASE_VARIABLE: str(lease.path),
        "PDSH_SSH_ARGS_APPEND": f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip(),
    }
    entries, kept = travelling_environment(environ)
    entries = {**entries, **read_usual_file(tuple(folder for folder in (home(), Path.cwd()) if folder is not None))}
    file = output_dir.absolute() / ENVIRONMENT_FILE
    write_environment_file(file, entries)
    remarks = [f"{', '.join(kept)} are not passed to other hosts: they look like secrets"] if kept else []
    remarks += fault_points.warnings()
    expected = [] if world_size is None else ["--expected_world_size", str(world_size)]
    return Prepared(
        command=[
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *launch.launcher_arguments,
            launch.program,
            *launch.program_arguments,
            *expected,
        ],
        environ={**environ, "DS_ENV_FILE": str(file)},
        lease=lease,
        world_size=world_size,
        remarks=remarks,
    )
