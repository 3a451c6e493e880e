"""Keep a module's weights in host memory and bring them to the device block by block, for prediction only."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MAX_BLOCK_BYTES = 256 * 2**20
NUM_SLOTS = 2  # one is computed from while the other is filled
_ALIGNMENT_BYTES = 512  # as CUDA's allocator aligns tensors, so the same kernels are chosen as for other tensors


class BlockOffload:
    """Hooks that bring each block of a frozen module to the device for its forward pass, and send nothing back.

    A block is a module of at most max_block_bytes, or a larger one without children. Two slots on the device, each as
    large as the largest block, hold the block that computes and the next one, so the device never holds more than two
    blocks. On CUDA, host memory is pinned and the next block is copied while the current one computes; the order of the
    last pass tells which block is next. Buffers, and parameters held directly by a module that is larger than a block,
    stay on the device. Between passes every parameter of a block is in host memory.

    Not for training: a backward pass would find other weights in the slots.
    """

    def __init__(self, module: nn.Module, *, device: torch.device, max_block_bytes: int = MAX_BLOCK_BYTES) -> None:
        """module: on the host, with frozen parameters that no two modules share; from now on it computes on device."""
        assert not any(parameter.requires_grad for parameter in module.parameters()), "offload is for frozen modules"
        self._device = device
        modules = list(_split(module, max_block_bytes))
        _keep_on_device(module, modules, device)
        self.blocks = [_Block(part, pin=device.type == "cuda") for part in modules]
        size = max((block.host.numel() for block in self.blocks), default=0)
        self.slots = [_Slot(size, device) for _ in self.blocks[:NUM_SLOTS]]
        self.num_copies = 0
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._previous: _Block | None = None
        self._next_after: dict[_Block, _Block] = {}
        for block in self.blocks:
            block.module.register_forward_pre_hook(lambda *_, block=block: self._enter(block))
            block.module.register_forward_hook(lambda *_, block=block: self._leave(block), always_call=True)

    def forget_copies(self) -> None:
        """Read every block anew from host memory, whose values were replaced: what the slots hold no longer counts."""
        for slot in self.slots:
            slot.block = None

    def _enter(self, block: _Block) -> None:
        """Let a block compute from its slot, then start to copy the block that followed it in the last pass."""
        slot = self._bring(block, apart_from=None)
        slot.wait_until_filled()
        block.point_at(slot.memory)
        if self._previous is not None:
            self._next_after[self._previous] = block
        self._previous = block
        following = self._next_after.get(block)
        if following is not None:
            self._bring(following, apart_from=slot)

    def _leave(self, block: _Block) -> None:
        for slot in self.slots:
            if slot.block is block:
                slot.note_last_use()
        block.point_at(block.host)

    def _bring(self, block: _Block, *, apart_from: _Slot | None) -> _Slot:
        """Return the slot that holds a block, and fill it if no slot does."""
        for slot in self.slots:
            if slot.block is block:
                return slot
        # if this pass takes another way than the last one, a prefetched block is overwritten like any other
        slot = next(slot for slot in self.slots if slot is not apart_from)
        slot.fill(block, self._copy_stream)
        self.num_copies += 1
        return slot


class _Block:
    """A module whose parameters are consecutive in one piece of host memory, so that one copy moves them all."""

    def __init__(self, module: nn.Module, *, pin: bool) -> None:
        self.module = module
        self._places: list[tuple[nn.Parameter, int]] = []
        size = 0
        for parameter in module.parameters():
            self._places.append((parameter, size))
            size += -(-parameter.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.host = _unforked(size)
        if pin:
            _pin(self.host)
        for parameter, start in self._places:
            view = _view(self.host, parameter, start)
            view.copy_(parameter.data)
            parameter.data = view

    def point_at(self, memory: Tensor) -> None:
        """Make the parameters views of memory that begins with the block's bytes."""
        for parameter, start in self._places:
            parameter.data = _view(memory, parameter, start)


class _Slot:
    """A piece of the device's memory that holds one block after another."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: _Block | None = None
        self._is_cuda = device.type == "cuda"
        self._filled: Any = torch.cuda.Event() if self._is_cuda else None
        self._last_use: Any = torch.cuda.Event() if self._is_cuda else None

    def fill(self, block: _Block, stream: Any) -> None:
        """Copy a block's bytes here; on CUDA on the given stream, once no kernel reads this slot any more."""
        self.block = block
        target = self.memory[: block.host.numel()]
        if not self._is_cuda:
            target.copy_(block.host)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._last_use)  # does not wait if it was never recorded
            target.copy_(block.host, non_blocking=True)
            self._filled.record(stream)

    def wait_until_filled(self) -> None:
        if self._is_cuda:
            torch.cuda.current_stream(self.memory.device).wait_event(self._filled)

    def note_last_use(self) -> None:
        if self._is_cuda:
            self._last_use.record(torch.cuda.current_stream(self.memory.device))


def _split(module: nn.Module, max_block_bytes: int) -> Iterator[nn.Module]:
    """Yield the largest modules within the limit; parameters that a larger module holds directly are left out.

    A ModuleList or ModuleDict is never yielded: it is not called, so a hook on it would not run.
    """
    is_container = isinstance(module, nn.ModuleList | nn.ModuleDict)
    size = sum(parameter.nbytes for parameter in module.parameters())
    if size == 0:
        return
    children = list(module.children())
    if not is_container and (size <= max_block_bytes or not children):
        yield module
        return
    for child in children:
        yield from _split(child, max_block_bytes)


def _keep_on_device(module: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Put everything that is in no block on the device permanently."""
    moved = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert len(moved) == len(set(moved)), "two blocks share a parameter"
    for parameter in module.parameters():
        if id(parameter) not in moved:
            parameter.data = parameter.data.to(device)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _view(memory: Tensor, like: Tensor, start: int) -> Tensor:
    """Return a view of memory from byte `start` on, with the dtype, shape and strides of another tensor."""
    flat = memory[start : start + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


def _unforked(size: int) -> Tensor:
    """Return host memory of this size that a forked process does not get.

    The kernel would copy pinned pages at once for each process of the loader: 5 GB of SDXL, eight times a rank. A
    process that reads the memory there ends. Source: madvise(2), MADV_DONTFORK; Linux commit 70e806e4e645.
    """
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def _pin(memory: Tensor) -> None:
    """Pin a tensor's pages, so that a GPU copies them asynchronously; Tensor.pin_memory rounds up to a power of 2."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
