"""Which rank this process is, from its launcher's environment variables; imports no torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ds_dpo.errors import ConfigError, shown

LARGEST_PORT = 65535
MOST_DIGITS = 18  # of a number; a longer one is none


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

    Raises ConfigError if only some of the variables are set, or if they contradict each other.
    """
    if _has_launcher(environ):
        return _possible(_from_launcher(environ))
    if _is_only_slurm_task(environ):
        return _possible(_from_slurm_step(environ))
    return RankEnvironment(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=_free_port(),
    )


def _possible(place: RankEnvironment) -> RankEnvironment:
    """Return a place. Raises ConfigError for numbers that no launcher gives."""
    problems = {
        "the number of ranks must be 1 or more": place.world_size >= 1,
        "ranks count from 0 to below their number": place.rank < place.world_size,
        "a node has 1 rank or more, and not more than there are": 1 <= place.local_world_size <= place.world_size,
        "ranks of a node count from 0 to below their number": place.local_rank < place.local_world_size,
        f"a port is a number from 1 to {LARGEST_PORT}": 1 <= place.master_port <= LARGEST_PORT,
        "the first node must have a name": bool(place.master_addr.strip()),
    }
    wrong = [words for words, holds in problems.items() if not holds]
    if wrong:
        raise ConfigError(
            f"the environment says that this is rank {place.rank} of {place.world_size}, on its node rank "
            f"{place.local_rank} of {place.local_world_size}, with the first node at "
            f"{place.master_addr!r}:{place.master_port}: {'; '.join(wrong)}; start with `deepspeed`, torchrun or srun, "
            "or unset the variables of another start"
        )
    return place


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
    master_addr = environ.get("MASTER_ADDR") or _first_slurm_host(environ.get("SLURM_STEP_NODELIST") or "127.0.0.1")
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
        return _tasks_of_node(node, text)
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


def _tasks_of_node(node: int, text: str) -> int:
    """Return the tasks of a node from SLURM's short form, in which 8(x2),4 is 8, 8, 4."""
    first = 0  # node of the part
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={shown(text)} cannot be read; it must be like 8(x2),4")
        first += int(match[2] or 1)
        if node < first:
            return int(match[1])
    raise ConfigError(
        f"the environment has SLURM_STEP_TASKS_PER_NODE={shown(text)}, which has {first} node(s), and "
        f"SLURM_NODEID={node}, which counts from 0; start with srun, or unset what is left of another job"
    )


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    value = environ.get(name, "")
    if value == "" and default is not None:
        return default
    if not value.isdecimal() or len(value) > MOST_DIGITS:
        raise ConfigError(f"the environment has {name}={shown(value)}, which must be a whole number")
    return int(value)


def _first_slurm_host(nodelist: str) -> str:
    if "[" not in nodelist:
        return nodelist.split(",")[0]
    if nodelist.startswith("-"):  # scontrol would take it for an option
        raise ConfigError(f"SLURM_STEP_NODELIST={shown(nodelist)} is no list of hosts; set MASTER_ADDR")
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"cannot read the first host of SLURM_STEP_NODELIST={shown(nodelist)} with scontrol ({error}); set "
            "MASTER_ADDR"
        ) from error
    if not names:
        raise ConfigError(
            f"scontrol names no host of SLURM_STEP_NODELIST={shown(nodelist)}; set MASTER_ADDR to the first one"
        )
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
