"""Run tasks in worker processes; results come in the order of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ds_dpo.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
PREFETCHED_TASKS = 2  # by each process


@dataclass(frozen=True)
class _Outcome(Generic[R]):
    """error: the message of a DataError; torch would wrap the error itself in a traceback."""

    result: R | None
    error: str | None


@dataclass(frozen=True)
class _Tasks(Dataset[_Outcome[R]], Generic[T, R]):
    work: Callable[[T], R]
    tasks: Sequence[T]

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> _Outcome[R]:
        try:
            return _Outcome(self.work(self.tasks[number]), None)
        except DataError as error:
            return _Outcome(None, str(error))


def run_tasks(work: Callable[[T], R], tasks: Sequence[T], *, workers: int) -> Iterator[R]:
    """Yield work(task) for each task, in order. workers: number of processes; 0 runs the tasks in this one.

    Raises DataError if the work raises it, or if a process died.
    """
    loader: DataLoader[_Outcome[R]] = DataLoader(
        _Tasks(work, tasks),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED_TASKS if workers else None,
        # fork: the workers share the opened dataset, and use neither the GPU nor torch's threads
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_start_worker,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    try:
        for outcome in loader:
            if outcome.error is not None:
                raise DataError(outcome.error)
            yield outcome.result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a worker process died ({error}); usually memory or shared memory (/dev/shm) was exhausted: lower "
            "data.workers, or provide more memory"
        ) from error


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork


def _as_it_is(outcome: Any) -> Any:
    return outcome
