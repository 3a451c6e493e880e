"""Work on pairs in processes of its own, results in the order of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ds_dpo.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
PREFETCHED_TASKS = 2  # of each process


@dataclass(frozen=True)
class _Outcome(Generic[R]):
    """error: a DataError's message; torch would put a traceback around the error itself."""

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
    """Yield work(task) for each task, in order. workers: processes; 0: this one.

    Raises DataError where the work does, or where a process died.
    """
    loader: DataLoader[_Outcome[R]] = DataLoader(
        _Tasks(work, tasks),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED_TASKS if workers else None,
        # fork: they share the opened dataset, and use neither the GPU nor torch's threads
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
            f"a process that reads images ended by itself ({error}); most often memory or shared memory (/dev/shm) ran "
            "out: lower data.workers, or give more"
        ) from error


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork


def _as_it_is(outcome: Any) -> Any:
    return outcome
