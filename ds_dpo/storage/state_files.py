"""Files of a checkpoint before they are written: their content, and copies that training cannot change."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_Key = tuple[torch.device, int, int]


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """One file of this rank.

    state: tensors in dicts, lists and tuples, and plain values; they may be the run's own, which training changes in
    place. write: writes a state to a path, possibly in another thread while training continues.
    """

    name: str
    state: Any
    write: Callable[[Any, Path], None]


def write_files(files: Iterable[StateFile], folder: Path) -> None:
    """Write files into an existing folder. Raises what their writers raise."""
    for file in files:
        file.write(file.state, folder / file.name)


def num_bytes(files: Sequence[StateFile]) -> int:
    """Return the bytes of all tensors in files; memory that tensors share counts once, as in a file."""
    return sum(_storages([file.state for file in files]).values())


class HostCopies:
    """Copies states into host memory, one snapshot at a time, and reuses that memory for the next one."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []

    def bytes_to_allocate(self, files: Sequence[StateFile]) -> int:
        """Return the bytes that a copy of files needs in addition to the memory of earlier copies."""
        left = {size: len(buffers) for size, buffers in self._free.items()}
        total = 0
        for size in _storages([file.state for file in files]).values():
            if left.get(size, 0) > 0:
                left[size] -= 1
            else:
                total += size
        return total

    def copy(self, files: Sequence[StateFile]) -> list[StateFile]:
        """Return the same files with copies of their states on the CPU, which are valid until `release`.

        Tensors that share memory also share it in the copy, so a file written from it is no larger.
        """
        copies: dict[_Key, Tensor] = {}
        return [replace(file, state=self._copy(file.state, copies)) for file in files]

    def release(self) -> None:
        """Reclaim the memory of the last copy."""
        for buffer in self._used:
            self._free[buffer.numel()].append(buffer)
        self._used.clear()

    def _copy(self, value: Any, copies: dict[_Key, Tensor]) -> Any:
        if type(value) in (Tensor, nn.Parameter):
            return self._copy_tensor(value, copies)
        if isinstance(value, dict):
            fresh = copy.copy(value)  # keeps the type of dict and its attributes, in which torch keeps versions
            for key, part in value.items():
                fresh[key] = self._copy(part, copies)
            return fresh
        if type(value) in (list, tuple):
            return type(value)(self._copy(part, copies) for part in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: Tensor, copies: dict[_Key, Tensor]) -> Tensor:
        storage = tensor.untyped_storage()
        key = _key(storage)
        if key not in copies:
            copies[key] = self._buffer(storage.nbytes())
            copies[key].copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
        fresh = torch.empty(0, dtype=tensor.dtype).set_(
            copies[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        return fresh.requires_grad_(tensor.requires_grad)

    def _buffer(self, size: int) -> Tensor:
        free = self._free[size]
        buffer = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        self._used.append(buffer)
        return buffer


def _key(storage: torch.UntypedStorage) -> _Key:
    return storage.device, storage.data_ptr(), storage.nbytes()


def _storages(value: Any) -> dict[_Key, int]:
    """Return the size of each piece of memory that holds tensors of a state."""
    return {_key(storage): storage.nbytes() for storage in map(Tensor.untyped_storage, _tensors(value))}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif type(value) in (list, tuple):
        for part in value:
            yield from _tensors(part)
