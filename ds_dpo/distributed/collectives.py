"""How ranks wait for one another, add up numbers and share small objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.errors import DsDpoError


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
