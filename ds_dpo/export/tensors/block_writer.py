"""Write a large file without the page cache, in whole blocks, while the next ones are filled.

Five gigabytes that nobody reads soon would push the shards, which are being read, out of the cache, and the allocation
of pages for them takes longer than all else in an export.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

BLOCK_BYTES = 4096
DIRECT = getattr(os, "O_DIRECT", 0)  # on Linux; other systems use the cache


class BlockWriter:
    """A file that is filled from the front: take() returns the place of the next bytes, which are written later.

    A thread writes one of two buffers while the other is filled. After an error the file is torn.
    """

    def __init__(self, path: Path, *, buffer_bytes: int) -> None:
        """buffer_bytes: the largest number of bytes for one take()."""
        # less than a block is left over from the previous buffer
        size = (buffer_bytes // BLOCK_BYTES + 2) * BLOCK_BYTES
        self._maps = [mmap.mmap(-1, size) for _ in range(2)]  # aligned to blocks, as direct writing requires
        self._buffers = [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in self._maps]
        self._used = 0
        self._num_bytes = 0
        self._descriptor = _open(path)
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._pending: concurrent.futures.Future[None] | None = None

    def take(self, num_bytes: int) -> Tensor:
        """Return the place of the next bytes; fill it before the next call. Raises OSError of an earlier write."""
        if self._used + num_bytes > len(self._buffers[0]):
            self._turn()
        place = self._buffers[0][self._used : self._used + num_bytes]
        self._used += num_bytes
        self._num_bytes += num_bytes
        return place

    def _turn(self) -> None:
        """Start to write the whole blocks of this buffer, and continue in the other."""
        whole = self._used // BLOCK_BYTES * BLOCK_BYTES
        self._wait()  # until the other buffer is written
        self._buffers[1][: self._used - whole].copy_(self._buffers[0][whole : self._used])
        self._pending = self._thread.submit(_write, self._descriptor, memoryview(self._maps[0])[:whole])
        self._used -= whole
        self._buffers.reverse()
        self._maps.reverse()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _finish(self) -> None:
        self._buffers[0][self._used : self._used + BLOCK_BYTES].zero_()
        self._used = -(-self._used // BLOCK_BYTES) * BLOCK_BYTES
        self._turn()
        self._wait()
        os.ftruncate(self._descriptor, self._num_bytes)

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._thread.shutdown()
            os.close(self._descriptor)


def _open(path: Path) -> int:
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    with contextlib.suppress(OSError):  # some file systems do not allow direct writing
        return os.open(path, flags | DIRECT, 0o666)
    return os.open(path, flags, 0o666)


def _write(descriptor: int, content: memoryview) -> None:
    while content:
        try:
            content = content[os.write(descriptor, content) :]
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & DIRECT:
                raise
            # the device has larger blocks
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
