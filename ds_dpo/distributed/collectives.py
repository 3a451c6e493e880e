"""Ranks: who this process is, and how ranks wait for, follow and agree with one another."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from ds_dpo.errors import ConfigError, DsDpoError


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """This process's place among all ranks; local means within its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_environment(environ: dict[str, str]) -> RankEnvironment:
    """Read this rank's place from what `deepspeed` or torchrun set, else srun, else take it for the only rank.

    Raises ConfigError where only some of the variables are set.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_launcher(environ)
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        return _from_slurm_step(environ)
    return RankEnvironment(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=_free_port(),
    )


def _from_launcher(environ: dict[str, str]) -> RankEnvironment:
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


def _from_slurm_step(environ: dict[str, str]) -> RankEnvironment:
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS")
    tasks_of_nodes = _tasks_of_nodes(environ.get("SLURM_STEP_TASKS_PER_NODE") or str(world_size))
    # every task of a job must arrive at the same port, and two jobs on a node at different ones
    own_port = 20000 + _number(environ, "SLURM_JOB_ID", default=0) % 20000
    master_addr = environ.get("MASTER_ADDR") or _first_slurm_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    return RankEnvironment(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID", default=0),
        local_world_size=tasks_of_nodes[_number(environ, "SLURM_NODEID", default=0)],
        master_addr=master_addr,
        master_port=_number(environ, "MASTER_PORT", default=own_port),
    )


def _tasks_of_nodes(text: str) -> list[int]:
    """Return the tasks of each node from SLURM's short form: 8(x2),4 is 8, 8, 4."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read; such as 8(x2),4 would fit")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def _number(environ: dict[str, str], name: str, *, default: int | None = None) -> int:
    value = environ.get(name, "")
    if value == "" and default is not None:
        return default
    if not value.isdecimal():
        raise ConfigError(f"the environment has {name}={value!r}; a whole number would fit")
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
    """Set the variables that torch.distributed and DeepSpeed read, whoever started this process."""
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
        LOCAL_SIZE=str(place.local_world_size),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
    )


def is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_initialized():
        distributed.barrier()


def sum_across_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over ranks of a tensor that every rank has in the same shape."""
    if is_initialized():
        distributed.all_reduce(values)
    return values


def gather_objects(value: object) -> list[object]:
    """Return every rank's small object, in order of rank, on every rank."""
    if not is_initialized():
        return [value]
    gathered: list[object] = [None] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: object) -> object:
    """Return rank 0's small object on every rank."""
    if not is_initialized():
        return value
    holder = [value]
    distributed.broadcast_object_list(holder)
    return holder[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank failed, so that none is left waiting in a later collective.

    A rank that failed raises its own error, the others the first failed rank's. Only that rank and rank 0 are to print
    it, so the others' is marked as said elsewhere.
    """
    # an error of another library may not survive pickling
    told = error if error is None or isinstance(error, DsDpoError) else RuntimeError(f"{type(error).__name__}: {error}")
    failures = gather_objects(told)
    failed = [number for number, failure in enumerate(failures) if failure is not None]
    if not failed:
        return
    raised = failures[failed[0]] if error is None else error
    assert isinstance(raised, Exception)
    if isinstance(raised, DsDpoError):
        raised.is_said_elsewhere = rank() not in (0, failed[0])
    raise raised


@contextmanager
def node_turns(place: RankEnvironment, *, ranks_at_once: int = 1) -> Iterator[None]:
    """Let a node's ranks pass through the body in turns, its first rank alone and first.

    The first rank's turn downloads; the others find files in the cache; and at most `ranks_at_once` ranks hold a
    full fp32 copy of a model in host memory. Every rank must enter; one rank's failure is raised on all.
    """
    num_turns = 1 + -(-(place.local_world_size - 1) // ranks_at_once)
    own_turn = 0 if place.local_rank == 0 else 1 + (place.local_rank - 1) // ranks_at_once
    most_turns = max(int(str(turns)) for turns in gather_objects(num_turns))
    for _ in range(own_turn):
        raise_together(None)
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)
    for _ in range(own_turn + 1, most_turns):
        raise_together(None)
