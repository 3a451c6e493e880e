"""Collectives: ranks wait for each other, add numbers and share small objects."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


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


def leave() -> None:
    """Leave the process groups after the last collective; NCCL would warn of it, and leave the rest to destructors."""
    if is_initialized():
        distributed.destroy_process_group()


def sum_across_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over ranks of a tensor that every rank has in the same shape."""
    if is_initialized():
        distributed.all_reduce(values)
    return values


def gather_objects(value: T) -> list[T]:
    """Return every rank's small object, in order of rank, on every rank."""
    if not is_initialized():
        return [value]
    gathered = [value] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Return rank 0's small object on every rank."""
    if not is_initialized():
        return value
    holder = [value]
    distributed.broadcast_object_list(holder)
    return holder[0]
