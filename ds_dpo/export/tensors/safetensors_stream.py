"""Write a safetensors file tensor by tensor; the library's own writer needs all of them in memory at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_dpo.export.tensors.block_writer import BlockWriter

DTYPE_NAMES: dict[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HEADER_ALIGNMENT_BYTES = 8
BUFFER_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is produced later."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_files(specs: Iterable[TensorSpec], *, max_bytes: int) -> list[list[TensorSpec]]:
    """Divide tensors, in order, over files of at most max_bytes of data; a larger tensor gets its own file."""
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
    """Write a file whose tensors are produced, written and released one after another.

    produce: returns the tensor of a spec, with exactly its shape and dtype. metadata: entries besides format=pt.
    """

    def fill(spec: TensorSpec, place: Tensor) -> None:
        tensor = produce(spec)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), spec.name
        place.copy_(tensor)

    stream_safetensors(path, specs, fill, metadata=metadata)


def stream_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    fill: Callable[[TensorSpec, Tensor], None],
    *,
    metadata: Mapping[str, str] | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> None:
    """Write a file whose tensors are filled directly in the buffers from which they are written.

    fill: puts the values of a spec into a tensor of its shape and dtype. metadata: entries besides format=pt.
    Memory: two buffers of buffer_bytes, or of the largest tensor if that is more.
    Source: format described in huggingface/safetensors (8-byte length, JSON header, data without gaps).
    """
    header = _header(specs, metadata or {})
    largest = max([len(header), *(spec.num_bytes for spec in specs)])
    with BlockWriter(path, buffer_bytes=max(buffer_bytes, largest)) as writer, one_thread():
        writer.take(len(header)).copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        for spec in specs:
            place = writer.take(spec.num_bytes)
            if place.storage_offset() % spec.dtype.itemsize == 0:
                fill(spec, place.view(spec.dtype).view(spec.shape))
            else:
                tensor = torch.empty(spec.shape, dtype=spec.dtype)
                fill(spec, tensor)
                place.copy_(tensor.reshape(-1).view(torch.uint8))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch from dividing small copies among threads, which would spin beside the writing thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
