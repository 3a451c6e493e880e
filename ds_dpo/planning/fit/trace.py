"""Count what a model's passes take, bytes of tensors and FLOP, by running them on torch's meta device: no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One call of a model. Weights, gradients of weights and inputs are not counted.

    stored_bytes: kept by the forward pass until the backward pass. peak_bytes: most that existed at once. flop: of both
    passes, with what is computed again; a product and a sum are 2.
    """

    stored_bytes: int
    peak_bytes: int
    flop: int


class Ledger(TorchDispatchMode):
    """Follows the storages of tensors from their creation to their end, and adds up FLOP.

    live: bytes that exist now. peak: the most so far. on_end: called with the id of each storage that has ended.
    """

    on_end: Callable[[int], None] = staticmethod(lambda number: None)

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.live, self.peak, self.flop = 0, 0, 0
        self._seen = {id(tensor.untyped_storage()) for tensor in known}
        self._known = [tensor.untyped_storage() for tensor in known]  # alive, so that no other gets such an id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **kwargs, out_val=found)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, id(storage), size)

    def _end(self, number: int, size: int) -> None:
        self._seen.discard(number)
        self.live -= size
        self.on_end(number)


def trace(module: nn.Module, call: Callable[[], Tensor], *, inputs: Sequence[Tensor], backward: bool) -> Traced:
    """Run a call of a module whose parameters and inputs are on the meta device, and count what it takes.

    backward: also its backward pass, in which each gradient of a weight goes as soon as it is complete, as ZeRO's do.
    Attention is counted as a fused kernel keeps it: queries, keys, values, output, and a number for each row.
    """
    with followed(module, inputs) as ledger, torch.set_grad_enabled(backward):
        found = call()
        stored = ledger.live
        if backward:
            run_backward(found)
    return Traced(stored_bytes=stored, peak_bytes=ledger.peak, flop=ledger.flop)


@contextmanager
def followed(module: nn.Module, inputs: Sequence[Tensor]) -> Iterator[Ledger]:
    """Follow what passes of a module on the meta device take; each gradient of a weight goes when it is complete."""
    parameters = list(module.parameters())
    handles = [each.register_post_accumulate_grad_hook(_drop) for each in parameters if each.requires_grad]
    try:
        with Ledger([*parameters, *module.buffers(), *inputs]) as ledger, _fused_attention(ledger):
            yield ledger
    finally:
        for handle in handles:
            handle.remove()


def run_backward(prediction: Tensor) -> None:
    """Run the backward pass of a loss that is the mean of squares."""
    prediction.float().square().mean().backward()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _fused_attention(ledger: Ledger) -> Iterator[None]:
    """Let attention be one operation: on the meta device torch would write out the whole matrix of scores."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            ledger.flop += _attention_flop(query, key)
            # in the layout of the queries, as fused kernels return it, so that joining the heads copies nothing
            found = torch.empty_like(query[..., : value.shape[-1]])
            row_sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
            context.save_for_backward(query, key, value, found, row_sums)
            return found

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            query, key, value, _, _ = context.saved_tensors
            # five products instead of two: the scores are computed again
            ledger.flop += _attention_flop(query, key) * 5 // 2
            return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    def attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Any:
        return Attention.apply(query, key, value)

    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def _attention_flop(query: Tensor, key: Tensor) -> int:
    """Return the FLOP of scores and of their product with the values: 4 x heads x queries x keys x width."""
    return 4 * query.numel() * key.shape[-2]
