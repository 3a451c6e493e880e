"""Read numbers and tensors from a cache's files, by offset: memory holds only what is asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_dpo.errors import DataError

MAX_OPEN_FILES = 128  # a process may open 1024 by default, and a cache has thousands of shards


class OpenFiles:
    """Files of one folder, open for reading; the one that was unused for longest is closed first.

    Forked processes may share the open files, because `pread` uses no file position.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` from a file. Raises DataError if the file cannot be read or is too short."""
        try:
            num_read = os.preadv(self._descriptor(name), [into], offset)
            while 0 < num_read < len(into):  # a signal or a network file system may cut a read short
                more = os.preadv(self._descriptor(name), [into[num_read:]], offset + num_read)
                num_read = num_read + more if more else -1
        except OSError as error:
            raise DataError(f"{self._folder / name}: cannot be read ({error.strerror})") from error
        if num_read != len(into):
            raise DataError(f"{self._folder / name}: ends before byte {offset + len(into)}; it was cut short")

    def _descriptor(self, name: str) -> int:
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
            return self._descriptors[name]
        if len(self._descriptors) >= MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[name] = descriptor
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def tensor(self, name: str, offset: int, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor whose bytes begin at an offset of a file; they are copied once."""
        values = torch.empty(shape, dtype=dtype)
        into: Any = values.view(-1).view(torch.uint8).numpy()
        self.read(name, offset, memoryview(into))
        return values


class RowFile:
    """Rows of a fixed size in a .npy file; each is read when it is asked for."""

    def __init__(self, files: OpenFiles, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        """Read the header. Raises DataError if the file holds other rows."""
        self._files, self._name, self._dtype = files, name, dtype
        try:
            with (folder / name).open("rb") as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"version {version}")
                shape, is_fortran, found = np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / name}: not readable as .npy ({error})") from error
        if found != dtype or len(shape) != 1 or is_fortran:
            raise DataError(f"{folder / name}: holds {found} in {shape}, not rows of {dtype.names}")
        self._num_rows = int(shape[0])

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < self._num_rows:
            raise DataError(f"{self._name}: there is no row {row}, it has {self._num_rows}")
        content = bytearray(self._dtype.itemsize)
        self._files.read(self._name, self._start + row * self._dtype.itemsize, memoryview(content))
        return np.frombuffer(content, self._dtype)[0]
