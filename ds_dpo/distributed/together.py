"""Do work on some ranks, and raise its error or return its result on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

from ds_dpo.distributed.collectives import broadcast_object, gather_objects, is_main, rank
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.errors import DsDpoError

T = TypeVar("T")
Error = TypeVar("Error", bound=DsDpoError)


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """Raise an error of the body on every rank, so that no rank waits in a later collective.

    Every rank must enter; a rank without work has an empty body, and no body contains a collective. A rank that failed
    raises its own error, the others raise that of the first failed rank. Only that rank and rank 0 print it. Costs one
    collective.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    _raise_on_each(error)


def _raise_on_each(error: Exception | None) -> None:
    # an error of another library may not survive pickling
    sent = error if error is None or isinstance(error, DsDpoError) else RuntimeError(f"{type(error).__name__}: {error}")
    failures = gather_objects(sent)
    failed = [of_rank for of_rank, failure in enumerate(failures) if failure is not None]
    if not failed:
        return
    raised = failures[failed[0]] if error is None else error
    assert raised is not None
    if isinstance(raised, DsDpoError):
        raised.is_said_elsewhere = rank() not in (0, failed[0])
    raise raised


def on_main(action: Callable[[], T]) -> T:
    """Return on every rank what an action returns on rank 0; an error there is raised on every rank.

    Costs two collectives.
    """
    result: T | None = None
    with raised_everywhere():
        if is_main():
            result = action()
    return cast(T, broadcast_object(result))


def said_once(error: Error) -> Error:
    """Mark an error that every rank raises, so that only rank 0 prints it. No collective."""
    error.is_said_elsewhere = not is_main()
    return error


@contextmanager
def node_turns(place: RankEnvironment, *, ranks_at_once: int = 1) -> Iterator[None]:
    """Let a node's ranks enter the body in turns; its first rank goes first and alone.

    The first rank downloads and the others find files in the cache. At most `ranks_at_once` ranks hold a full fp32 copy
    of a model in host memory. Every rank must enter; an error of one rank is raised on all.
    """
    num_turns = 1 + -(-(place.local_world_size - 1) // ranks_at_once)
    own_turn = 0 if place.local_rank == 0 else 1 + (place.local_rank - 1) // ranks_at_once
    for turn in range(max(gather_objects(num_turns))):
        with raised_everywhere():
            if turn == own_turn:
                yield
