"""Which rank this process is, from its launcher's environment variables; imports no torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ds_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """This process's place among all ranks; local means within its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_environment(environ: Mapping[str, str]) -> RankEnvironment:
    """Read this rank's place from the variables of `deepspeed` or torchrun, else srun; else it is the only rank.

    Raises ConfigError if only some of the variables are set.
    """
    if _has_launcher(environ):
        return _from_launcher(environ)
    if _is_only_slurm_task(environ):
        return _from_slurm_step(environ)
    return RankEnvironment(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=_free_port(),
    )


def rank_in(environ: Mapping[str, str]) -> int:
    """Return the rank alone, 0 if it is not set. Raises ConfigError if it is not a number."""
    return _number(environ, "SLURM_PROCID" if _is_only_slurm_task(environ) else "RANK", default=0)


def local_rank_in(environ: Mapping[str, str]) -> int:
    """Return the rank within its node alone, as rank_in does."""
    return _number(environ, "SLURM_LOCALID" if _is_only_slurm_task(environ) else "LOCAL_RANK", default=0)


def _has_launcher(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ or "WORLD_SIZE" in environ


def _is_only_slurm_task(environ: Mapping[str, str]) -> bool:
    return not _has_launcher(environ) and "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ


def _from_launcher(environ: Mapping[str, str]) -> RankEnvironment:
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in environ]
    if missing:
        raise ConfigError(
            f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}; start with `deepspeed`, torchrun or "
            "srun, or unset them to run on one rank"
        )
    world_size = _number(environ, "WORLD_SIZE")
    # `deepspeed` says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
    local_size = "LOCAL_SIZE" if environ.get("LOCAL_SIZE") else "LOCAL_WORLD_SIZE"
    return RankEnvironment(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, local_size, default=world_size),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT", default=29500),
    )


def _from_slurm_step(environ: Mapping[str, str]) -> RankEnvironment:
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS")
    # all tasks of a job need the same port, and two jobs on a node need different ones
    own_port = 20000 + _number(environ, "SLURM_JOB_ID", default=0) % 20000
    master_addr = environ.get("MASTER_ADDR") or _first_slurm_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    return RankEnvironment(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID", default=0),
        local_world_size=_tasks_of_this_node(environ, world_size),
        master_addr=master_addr,
        master_port=_number(environ, "MASTER_PORT", default=own_port),
    )


def _tasks_of_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """Return the tasks of this node by SLURM's list, or by the numbers of the job if each node has as many.

    Raises ConfigError if neither says it.
    """
    node = _number(environ, "SLURM_NODEID", default=0)
    text = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if text:
        tasks = _tasks_of_nodes(text)
        if node < len(tasks):
            return tasks[node]
        raise ConfigError(
            f"the environment has SLURM_STEP_TASKS_PER_NODE={text!r}, which has {len(tasks)} node(s), and "
            f"SLURM_NODEID={node}, which counts from 0; start with srun, or unset what is left of another job"
        )
    num_nodes = _number(environ, "SLURM_STEP_NUM_NODES", default=_number(environ, "SLURM_NNODES", default=1))
    of_each = world_size if num_nodes == 1 else _number(environ, "SLURM_NTASKS_PER_NODE", default=0)
    if node < num_nodes and of_each * num_nodes == world_size:
        return of_each
    raise ConfigError(
        f"the environment has SLURM_STEP_NUM_TASKS={world_size} and SLURM_NODEID={node} but no "
        f"SLURM_STEP_TASKS_PER_NODE, and SLURM_NNODES={environ.get('SLURM_NNODES')!r} with SLURM_NTASKS_PER_NODE="
        f"{environ.get('SLURM_NTASKS_PER_NODE')!r} does not say how many tasks this node has; start with srun "
        "--ntasks-per-node, or set SLURM_STEP_TASKS_PER_NODE, such as 8(x2)"
    )


def _tasks_of_nodes(text: str) -> list[int]:
    """Return the tasks of each node from SLURM's short form: 8(x2),4 is 8, 8, 4."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read; it must be like 8(x2),4")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    value = environ.get(name, "")
    if value == "" and default is not None:
        return default
    if not value.isdecimal():
        raise ConfigError(f"the environment has {name}={value!r}, which must be a whole number")
    return int(value)


def _first_slurm_host(nodelist: str) -> str:
    if "[" not in nodelist:
        return nodelist.split(",")[0]
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"cannot read the first host of SLURM_STEP_NODELIST={nodelist!r} with scontrol ({error}); set MASTER_ADDR"
        ) from error
    return names[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def export_environment(place: RankEnvironment) -> None:
    """Set the variables that torch.distributed and DeepSpeed read."""
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
        LOCAL_SIZE=str(place.local_world_size),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
    )
