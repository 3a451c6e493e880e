"""Trace what each block of a denoiser keeps for its backward pass, on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_iter

from ds_dpo.models.denoiser.recomputation import call_blocks_by
from ds_dpo.planning.fit.blocks import Block, BlockTable, Moment
from ds_dpo.planning.fit.trace import Ledger, followed, run_backward


def trace_blocks(denoiser: ModelMixin, call: Callable[[], Tensor], *, inputs: Sequence[Tensor]) -> BlockTable:
    """Run a denoiser on the meta device forward and backward, without checkpoints, and return what its blocks take.

    call: calls the denoiser with the inputs. Afterwards the denoiser checkpoints no block.
    """
    with followed(denoiser, inputs) as ledger, torch.enable_grad():
        watch = _Watch(ledger, {module: name for name, module in denoiser.named_modules()})
        call_blocks_by(denoiser, watch.call)
        try:
            run_backward(call())
        finally:
            denoiser.disable_gradient_checkpointing()
        return watch.table()


class _Watch:
    """Cuts both passes into moments: where a block begins or ends, and where an input of a block ends."""

    def __init__(self, ledger: Ledger, names: dict[nn.Module, str]) -> None:
        self._ledger, self._names = ledger, names
        self._moments: list[Moment] = []
        self._blocks: list[Block] = []
        self._most: list[int] = []  # by block: what exists besides while it is computed
        self._keeping: frozenset[int] = frozenset()
        self._turn: int | None = None
        self._gone: frozenset[int] = frozenset()
        self._inputs: dict[int, int] = {}  # by id of a storage that exists: its number
        self._input_bytes: list[int] = []
        ledger.on_end = self._input_ended

    def table(self) -> BlockTable:
        self._cut()
        return BlockTable(
            blocks=self._blocks, moments=self._moments, input_bytes=self._input_bytes, flop=self._ledger.flop
        )

    def call(self, block: nn.Module, *inputs: Any) -> Any:
        """Call a block in the forward pass, and wait for its turn in the backward pass."""
        ledger, number = self._ledger, len(self._blocks)
        self._cut()
        before, flop_before, last = ledger.live, ledger.flop, [0]
        taken = frozenset(self._number_of(each) for each in _storages(inputs))
        with _noting_saves(lambda: last.__setitem__(0, ledger.flop - flop_before)):
            results = block(*inputs)
        made = {id(each): each.nbytes() for each in _storages(results) if id(each) not in self._inputs}
        kept = max(0, ledger.live - before - sum(made.values()))
        self._blocks.append(Block(name=self._names[block], kept_bytes=kept, flop=last[0], inputs=taken))
        self._most.append(max(0, ledger.peak - before))
        self._cut()
        self._keeping |= {number}
        for each in tree_iter(results):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(lambda _: self._begin_turn(number))
        return results

    def _begin_turn(self, number: int) -> None:
        """Begin the backward pass of a block; the gradient of its second result changes nothing."""
        if number not in self._keeping:
            return
        self._cut()
        self._turn, self._keeping = number, self._keeping - {number}
        again = self._ledger.live - self._blocks[number].kept_bytes + self._most[number]
        self._note(again, again=True)

    def _number_of(self, storage: torch.UntypedStorage) -> int:
        if id(storage) not in self._inputs:
            self._inputs[id(storage)] = len(self._input_bytes)
            self._input_bytes.append(storage.nbytes())
        return self._inputs[id(storage)]

    def _input_ended(self, number: int) -> None:
        ended = self._inputs.pop(number, None)
        if ended is not None:
            self._cut()
            self._gone |= {ended}

    def _cut(self) -> None:
        self._note(self._ledger.peak, again=False)
        self._ledger.peak = self._ledger.live

    def _note(self, peak: int, *, again: bool) -> None:
        moment = Moment(peak_bytes=peak, keeping=self._keeping, turn=self._turn, gone=self._gone, again=again)
        self._moments.append(moment)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_iter(values) if isinstance(each, Tensor)]


@contextmanager
def _noting_saves(note: Callable[[], object]) -> Iterator[None]:
    """Call note each time that an operation saves a tensor for its backward pass."""

    def pack(tensor: Tensor) -> Tensor:
        note()
        return tensor.detach()  # the tensor itself would be a cycle, if it is the operation's own result

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
