"""Read single parameters, their averages and optimizer states from the shards of any ZeRO stage, one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.archive import saved_stem
from ds_dpo.zero_shards.files import AVERAGE_KINDS, TagFiles, check_saved_name, find_files
from ds_dpo.zero_shards.layout import Placement, Span, spans_within
from ds_dpo.zero_shards.stages import open_stage
from ds_dpo.zero_shards.tables import OptimizerStates, Shards, Table, VerificationBeside, verify_tensors
from ds_dpo.zero_shards.training_state import TrainingState, read_training_state
from ds_dpo.zero_shards.unpickle import Shard, load_shard

PIECE_ELEMENTS = 2**18  # with its 16-bit copy 1.5 MB, which fits the processor's cache
Quantity = (
    str  # fp32, a kind of moving average, or the name of one of the optimizer's elementwise states, such as exp_avg
)


@dataclasses.dataclass(frozen=True)
class ZeroCheckpoint:
    """An opened checkpoint: its content, and read() for one tensor of it.

    global_steps: number of updates. parameters: name -> placement, in DeepSpeed's order, frozen ones last.
    """

    folder: Path
    stage: int
    world_size: int
    global_steps: int
    parameters: dict[str, Placement]
    _shards: Shards
    _first: tuple[Mapping[str, Any], Mapping[str, Any]]  # model and optimizer states of the first rank
    _verify: bool
    _verified: set[tuple[str, int, int]] = dataclasses.field(default_factory=set)  # kind of table, rank, group
    _beside: list[VerificationBeside] = dataclasses.field(default_factory=list)  # one item inside verified_beside

    @property
    def has_ema(self) -> bool:
        """Whether moving averages of the weights were saved that an export may take."""
        return self.has_average("ema")

    def has_average(self, kind: str) -> bool:
        """Whether this kind of moving averages was saved, one of files.AVERAGE_KINDS."""
        return kind in self._shards.average_updates

    def average_updates(self, kind: str) -> int:
        """Return the number of updates in a kind of moving averages that was saved."""
        return self._shards.average_updates[kind]

    @property
    def optimizer(self) -> OptimizerStates:
        """What the optimizer keeps besides the weights."""
        return self._shards.optimizer

    def training(self) -> TrainingState:
        """Return what else a resumed run needs. Raises CheckpointError if the files lack some of it."""
        return read_training_state(*self._first, folder=self.folder)

    @contextlib.contextmanager
    def verified_beside(self) -> Iterator[None]:
        """Verify files on another thread while they are read; the result is only known at the end.

        Do not use what was made of the values before the end. There it raises CheckpointError for a file whose bits
        have changed, even if something else failed first, because changed bits may have caused that.
        """
        with VerificationBeside() as beside:
            self._beside.append(beside)
            try:
                yield
            finally:
                self._beside.remove(beside)

    def read(
        self,
        name: str,
        quantity: Quantity = "fp32",
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        inspect: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Copy one full tensor out of the shards.

        fp32 is the master weight, ema its moving average, and reference the one that a reference follows; for a frozen
        weight all are the weight as it was saved.
        out: contiguous tensor of the same number of elements to fill; its dtype is then used. inspect: called with
        every piece, flat and as it was saved, while it is in the processor's cache.
        Returns a tensor of the parameter's shape in dtype, rounded to nearest from fp32.
        Raises CheckpointError for an unknown name, a quantity that the checkpoint does not have, and a file whose bits
        have changed (see verified_beside).
        """
        placement, kind = self._locate(name, quantity)
        result = torch.empty(placement.numel, dtype=dtype) if out is None else out.view(-1)
        self._copy(placement.spans, kind, result, inspect)
        return result.view(placement.shape)

    def read_part(self, name: str, quantity: Quantity = "fp32", *, start: int, out: Tensor) -> None:
        """Copy elements of one tensor in its flat form into out; see read.

        out: (elements,), of any dtype and device; it gets as many elements as it has, from start on.
        """
        placement, kind = self._locate(name, quantity)
        self._copy(spans_within(placement, start, start + out.numel()), kind, out)

    def _copy(
        self, spans: Sequence[Span], kind: str, out: Tensor, inspect: Callable[[Tensor], None] | None = None
    ) -> None:
        if self._verify:
            self._verify_spans(spans, kind)
        filled = 0
        for source in self._pieces(spans, self._shards.tables[kind]):
            out[filled : filled + source.numel()].copy_(source)
            filled += source.numel()
            if inspect is not None:
                inspect(source)
        assert filled == out.numel(), (kind, spans)

    def _verify_spans(self, spans: Sequence[Span], kind: str) -> None:
        table = self._shards.tables[kind]
        new = {(kind, span.rank, span.group) for span in spans} - self._verified
        tensors = (table[rank].tensor(group) for _, rank, group in new)
        if self._beside:
            self._beside[-1].begin(tensors)
        else:
            verify_tensors(tensors)
        self._verified.update(new)

    def _pieces(self, spans: Sequence[Span], table: Table) -> Iterator[Tensor]:
        """Yield the elements of spans in order; small parts are joined, because each costs as much as a large one."""
        waiting: list[Tensor] = []
        num_waiting = 0
        for span in spans:
            tensor, archive = table[span.rank].tensor(span.group)
            flat = tensor if tensor.dim() == 1 else tensor.reshape(-1)
            for start in range(span.start, span.stop, PIECE_ELEMENTS):
                piece = flat[start : min(start + PIECE_ELEMENTS, span.stop)]
                archive.count_touched(piece)
                if num_waiting and num_waiting + piece.numel() > PIECE_ELEMENTS:
                    yield _joined(waiting)
                    waiting, num_waiting = [], 0
                waiting.append(piece)
                num_waiting += piece.numel()
        if waiting:
            yield _joined(waiting)

    def _locate(self, name: str, quantity: Quantity) -> tuple[Placement, str]:
        if name not in self.parameters:
            raise CheckpointError(f"{self.folder}: has no parameter {name!r} among its {len(self.parameters)}")
        placement = self.parameters[name]
        is_saved_weight = placement.is_frozen and (quantity == "fp32" or self.has_average(quantity))
        kind = "frozen" if is_saved_weight else quantity
        if kind not in self._shards.tables or (placement.is_frozen and not is_saved_weight):
            raise CheckpointError(
                f"{self.folder}: has no {quantity} of {name!r} ({self._why_absent(placement, quantity)})"
            )
        return placement, kind

    def _why_absent(self, placement: Placement, quantity: Quantity) -> str:
        if quantity in AVERAGE_KINDS:
            return "the run kept no moving averages"
        return (
            "the parameter is frozen" if placement.is_frozen else f"ZeRO {self.stage} before any update, or not saved"
        )


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def open_checkpoint(folder: Path, *, verify: bool = True) -> ZeroCheckpoint:
    """Open a DeepSpeed tag folder: file headers are read and compared, tensors are not.

    verify: compare each tensor with the checksum that torch wrote into its file before it is first read; not needed
    after a manifest was verified.
    Raises CheckpointError that names a file which is missing, torn, foreign, of another run, or unsafe.
    """
    files = find_files(folder)
    model = _load_model_states(files)
    first = model[0].content
    optimizer = [_load(path) for path in files.optimizer]
    shards = open_stage(files, model, optimizer)
    return ZeroCheckpoint(
        folder=folder,
        stage=shards.stage,
        world_size=max(len(files.optimizer), int(first.get("dp_world_size", 1))),
        global_steps=int(first.get("global_steps", 0)),
        parameters=shards.placements,
        _shards=shards,
        _first=(first, optimizer[0].content["optimizer_state_dict"] if optimizer else {}),
        _verify=verify,
    )


def _load_model_states(files: TagFiles) -> list[Shard]:
    """Load the first rank's file, and those of other ranks if they hold parts of frozen weights."""
    first = _load(files.model[0])
    if first.content.get("frozen_param_shapes"):
        return [first, *(_load(path) for path in files.model[1:])]
    for path in files.model[1:]:
        check_saved_name(path, saved_stem(path))
    return [first]


def _load(path: Path) -> Shard:
    shard = load_shard(path)
    check_saved_name(path, shard.archive.stem)
    return shard
