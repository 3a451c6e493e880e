"""Write a safetensors file tensor by tensor; the library's own writer wants all of them in memory at once."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES: dict[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HEADER_ALIGNMENT_BYTES = 8
# not os.posix_fallocate, which fills the file by hand where the file system cannot
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is still to be produced."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_files(specs: Iterable[TensorSpec], *, max_bytes: int) -> list[list[TensorSpec]]:
    """Divide tensors, in order, over files of at most max_bytes of data; a larger tensor has a file of its own."""
    files: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not files or spec.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(spec)
        room -= spec.num_bytes
    return files


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file whose tensors are produced, written and let go one after another.

    produce: gives the tensor of a spec, of exactly its shape and dtype. metadata: entries beside format=pt.
    Source: format described in huggingface/safetensors (8-byte length, JSON header, data without gaps).
    """
    # one thread writes a tensor while the next is produced: both spend their time outside of Python
    with path.open("wb", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(max_workers=1) as writer:
        header = _header(specs, metadata or {})
        _reserve(file, len(header) + sum(spec.num_bytes for spec in specs))
        pending = writer.submit(_write, file, header)
        for spec in specs:
            tensor = produce(spec)
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), spec.name
            pending.result()
            # as bytes: numpy knows no bfloat16
            pending = writer.submit(_write, file, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        pending.result()


def _reserve(file: BinaryIO, num_bytes: int) -> None:
    """Take the blocks of the whole file at once, which halves the time to write it, where the file system can."""
    failure = ctypes.get_errno() if LIBC.fallocate(file.fileno(), 0, 0, num_bytes) else 0
    if failure == errno.ENOSPC:
        raise OSError(failure, os.strerror(failure))


def _write(file: BinaryIO, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for spec in specs:
        stop = start + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text
