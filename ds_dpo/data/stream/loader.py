"""The stream of a rank's micro-batches: the same pairs in the same steps for any number of ranks, workers or restarts.

Legend: S is the type of samples that a reader returns.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_dpo.config.data import DataConfig
from ds_dpo.data.source import BadRow, BadRowError
from ds_dpo.data.stream.bad_rows import too_many_bad_rows
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

S = TypeVar("S")

# even if every second row were bad, only one position in 10**6 would need more
MAX_REPLACEMENTS = 20


class PairReader(Protocol[S]):
    """The input of the stream: pairs by index, as samples S, a dataclass of tensors and other values.

    Reading must depend on its arguments alone, because workers share nothing.
    """

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of pairs in each bucket; the indices of bucket k begin at sum(bucket_sizes[:k])."""

    def read(self, index: int, visit: int) -> S:
        """Return one pair with the draws of a visit. Raises BadRowError if this pair cannot be used."""

    def join(self, parts: list[S]) -> S:
        """Concatenate pairs of one bucket."""


@dataclass(frozen=True, kw_only=True)
class _Loaded(Generic[S]):
    """A micro-batch as a worker returns it."""

    samples: S
    bad_rows: list[BadRow]

    def pin_memory(self) -> _Loaded[S]:
        """Return a copy in page-locked memory; DataLoader calls it."""
        samples: Any = self.samples
        values = {field.name: getattr(samples, field.name) for field in fields(samples)}
        pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, samples=replace(samples, **pinned))


@dataclass(frozen=True, kw_only=True)
class _Unreadable:
    """The other result of a worker. error: the message of a DataError; torch would wrap the error in a traceback."""

    bad_rows: list[BadRow]
    error: str


@dataclass(frozen=True, kw_only=True)
class ReadPair(Generic[S]):
    """What was read at a position.

    sample: of the pair `index`; None if it is unreadable and nothing replaces it (only reference/cache reads so).
    bad: index and reason of each unreadable pair that was tried before.
    """

    sample: S
    index: int
    visit: int
    bad: Sequence[tuple[int, BadRow]]


def read_position(pairs: PairReader[S], order: PairOrder, position: int) -> ReadPair[S]:
    """Return the pair at a position, or its first readable replacement.

    Raises DataError if none of them can be read.
    """
    index, visit = order.place(position)
    bad: list[tuple[int, BadRow]] = []
    for attempt in range(1, MAX_REPLACEMENTS + 2):
        try:
            return ReadPair(sample=pairs.read(index, visit), index=index, visit=visit, bad=bad)
        except BadRowError as error:
            bad.append((index, error.bad_row))
        index = order.replacement(position, attempt)
    raise UnreadablePositionError(position, [row for _, row in bad])


class UnreadablePositionError(DataError):
    """Neither the pair at a position nor any replacement can be read. bad_rows: all of them."""

    def __init__(self, position: int, bad_rows: list[BadRow]) -> None:
        super().__init__(
            f"position {position}: neither its pair nor {MAX_REPLACEMENTS} replacements can be read; the last is "
            f"{bad_rows[-1]}"
        )
        self.bad_rows = bad_rows


@dataclass(frozen=True, kw_only=True)
class _MicroBatches(Dataset[_Loaded[S] | _Unreadable]):
    """Micro-batches by positions. They depend on the fields and the positions alone, so workers share nothing."""

    pairs: PairReader[S]
    order: PairOrder

    def __getitem__(self, positions: range) -> _Loaded[S] | _Unreadable:
        bad_rows: list[BadRow] = []
        parts: list[S] = []
        try:
            for position in positions:
                read = read_position(self.pairs, self.order, position)
                bad_rows += [row for _, row in read.bad]
                parts.append(read.sample)
        except UnreadablePositionError as error:
            return _Unreadable(bad_rows=bad_rows + error.bad_rows, error=str(error))
        except DataError as error:
            return _Unreadable(bad_rows=bad_rows, error=str(error))
        return _Loaded(samples=self.pairs.join(parts), bad_rows=bad_rows)


@dataclass(frozen=True, kw_only=True)
class _RankPositions:
    """A rank's micro-batches as ranges of positions, endless.

    A step holds the positions [pairs_seen + step * pairs_per_step, + pairs_per_step). Each rank takes a slice of them,
    and each micro-batch a slice of that.
    """

    pairs_per_step: int
    micro_batch_pairs: int
    rank: int
    world_size: int
    pairs_seen: int

    def __iter__(self) -> Iterator[range]:
        pairs_per_rank = self.pairs_per_step // self.world_size
        for step_start in itertools.count(self.pairs_seen, self.pairs_per_step):
            start = step_start + self.rank * pairs_per_rank
            for first in range(start, start + pairs_per_rank, self.micro_batch_pairs):
                yield range(first, first + self.micro_batch_pairs)


class PairStream(Generic[S]):
    """A rank's endless micro-batches; `bad_rows` lists the rows replaced so far."""

    def __init__(
        self,
        micro_batches: _MicroBatches[S],
        positions: _RankPositions,
        *,
        data: DataConfig,
        say: Say,
    ) -> None:
        """positions: this rank's. say: called with a line for each bad row."""
        self._max_bad_rows = data.max_bad_rows
        self._say = say
        self._bad_rows: list[BadRow] = []
        # batch_size None, because an item is a whole micro-batch already
        self._loader: DataLoader[_Loaded[S] | _Unreadable] = DataLoader(
            micro_batches,
            sampler=positions,
            batch_size=None,
            num_workers=data.workers,
            prefetch_factor=data.prefetch if data.workers else None,
            # not for later passes (there is only one), but so that torch ends workers in order at exit
            persistent_workers=data.workers > 0,
            # fork, not spawn: workers share the opened dataset and need not import the training program. This is safe,
            # because they use neither the GPU nor torch's threads; see _start_worker.
            multiprocessing_context="fork" if data.workers else None,
            worker_init_fn=_start_worker,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            # otherwise DataLoader would draw a seed, unused here, from the global generator
            generator=torch.Generator(),
        )

    @property
    def bad_rows(self) -> list[BadRow]:
        """All bad rows of the micro-batches yielded so far; a row counts again in each epoch."""
        return list(self._bad_rows)

    def __iter__(self) -> Iterator[S]:
        """Yield micro-batches from pairs_seen on.

        Raises DataError if this rank has more bad rows than data.max_bad_rows, if a position has no readable pair, or
        if a worker died.
        """
        with _signals_held_back(), _deaths_explained(), _child_handler_kept():
            loaded = iter(self._loader)
        while True:
            yield self._take(loaded)

    def _take(self, loaded: Iterator[_Loaded[S] | _Unreadable]) -> S:
        with _deaths_explained():
            batch = next(loaded)
        for bad_row in batch.bad_rows:
            self._bad_rows.append(bad_row)
            self._say(f"bad row replaced: {bad_row}")
        error = too_many_bad_rows(self._bad_rows, limit=self._max_bad_rows)
        if error is not None:
            raise error
        if isinstance(batch, _Unreadable):
            raise DataError(batch.error)
        return batch.samples


def open_stream(
    pairs: PairReader[S],
    *,
    data: DataConfig,
    seed: int,
    pairs_per_step: int,
    micro_batch_pairs: int,
    rank: int,
    world_size: int,
    pairs_seen: int,
    say: Say,
) -> PairStream[S]:
    """Return this rank's micro-batches from pairs_seen on; the start takes no longer for a larger pairs_seen.

    say: called with a line for each bad row. The steps hold the same pairs with the same draws in the same order for
    any world_size, micro_batch_pairs and data.workers.
    """
    assert pairs_per_step % (world_size * micro_batch_pairs) == 0, "the resolver refuses other batches"
    assert pairs_seen % pairs_per_step == 0, "a run keeps its pairs_per_step, and saves between steps"
    order = PairOrder(pairs.bucket_sizes, pairs_per_step=pairs_per_step, seed=seed)
    positions = _RankPositions(
        pairs_per_step=pairs_per_step,
        micro_batch_pairs=micro_batch_pairs,
        rank=rank,
        world_size=world_size,
        pairs_seen=pairs_seen,
    )
    return PairStream(_MicroBatches(pairs=pairs, order=order), positions, data=data, say=say)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block signals: permanently in processes started inside; this process gets them when it leaves the block.

    SLURM and Ctrl-C signal every process of a job, but the trainer decides when to stop and needs its workers until
    then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """Remove the handler of SIGCHLD that DataLoader installs when it starts its workers.

    It would raise an error for a dead worker at any point of this process, for example in the middle of a collective.
    Without it, DataLoader still checks its workers inside next(), every 5 s while it waits for a batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@contextmanager
def _deaths_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a loader process died ({error}); usually memory or shared memory (/dev/shm) was exhausted: lower "
            "data.workers, or provide more memory"
        ) from error


def _start_worker(worker: int) -> None:
    # threads of OpenMP do not survive a fork, and waiting for them would never end
    torch.set_num_threads(1)
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(trainer: int) -> None:
    """End this worker on SIGTERM from its trainer, which sends it at exit; a SIGTERM from others is for the trainer."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _as_it_is(loaded: Any) -> Any:
    return loaded
