"""A file of torch.save, mapped into memory: its records, and whether they are intact."""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
import sys
import zipfile
from pathlib import Path

import torch
from isal.isal_zlib import crc32  # zlib's checksum with special processor instructions, several times as fast
from torch import Tensor

from ds_dpo.errors import CheckpointError, cut
from ds_dpo.outside import open_regular

LOCAL_MAGIC = b"PK\x03\x04"
END_MAGIC, END_BYTES = b"PK\x05\x06", 22  # torch writes no comment after it
LOCAL_HEADER = struct.Struct("<4s22xHH")
CHUNK_BYTES = 4 * 2**20  # stays in the processor's cache
PICKLE = "data.pkl"
BYTE_ORDER = "byteorder"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """The place of a record's bytes in the file, and their CRC-32."""

    start: int
    size: int
    crc32: int


class Archive:
    """A zip file of torch.save, memory-mapped: pages are read when they are touched and can be released.

    stem: the file's name without suffix when it was saved. records: by name within the archive.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and read its directory. Raises CheckpointError for a missing, torn or foreign file."""
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
        self.path = path
        try:
            with open_regular(path) as file:
                # writable but private: torch needs a writable buffer, and the file never changes
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.stem, self.records = self._read_directory()
        except Exception as error:  # a damaged directory can fail in any line of the zip reader
            raise CheckpointError(f"{path}: torn, damaged, or not a file of torch.save ({cut(str(error))})") from error
        self._base = self.tensor(0, torch.uint8, 1).data_ptr()
        self._by_start = {record.start: name for name, record in self.records.items()}
        self._verified: set[str] = set()
        self._touched_bytes = 0

    def _read_directory(self) -> tuple[str, dict[str, Record]]:
        with zipfile.ZipFile(self.path) as directory:
            entries = directory.infolist()
        records, stems = {}, set()
        for entry in entries:
            stem, _, name = entry.filename.partition("/")
            stems.add(stem)
            records[name] = self._locate(entry)
        if len(stems) != 1 or PICKLE not in records:
            raise ValueError(f"no {PICKLE} in its folder")
        return stems.pop(), records

    def _locate(self, entry: zipfile.ZipInfo) -> Record:
        magic, name_length, extra_length = LOCAL_HEADER.unpack_from(self._map, entry.header_offset)
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        is_plain = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if magic != LOCAL_MAGIC or not is_plain or start + entry.file_size > len(self._map):
            raise ValueError(f"record {entry.filename} is damaged")
        return Record(start, entry.file_size, entry.CRC)

    def content(self, name: str) -> bytes:
        """Return the bytes of a small record, verified. Raises CheckpointError if it is missing or damaged."""
        if name not in self.records:
            raise CheckpointError(f"{self.path}: damaged, the record {name!r} is missing")
        self.verify(name)
        record = self.records[name]
        return self._map[record.start : record.start + record.size]

    def check_byte_order(self) -> None:
        """Raise CheckpointError if the numbers were saved in another byte order than this machine's."""
        found = self.content(BYTE_ORDER).decode() if BYTE_ORDER in self.records else "little"
        if found != sys.byteorder:
            raise CheckpointError(f"{self.path}: saved in {found!r} byte order, this machine's is {sys.byteorder!r}")

    def tensor(self, start: int, dtype: torch.dtype, numel: int) -> Tensor:
        """Return a flat tensor over bytes of the file."""
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=start)

    def verify(self, name: str) -> None:
        """Compare a record with its CRC-32, once. Raises CheckpointError that names the file if they differ."""
        if name in self._verified:
            return
        record, found = self.records[name], 0
        stop = record.start + record.size
        with memoryview(self._map) as view:
            for start in range(record.start, stop, CHUNK_BYTES):
                end = min(start + CHUNK_BYTES, stop)
                found = crc32(view[start:end], found)
                self._map.madvise(mmap.MADV_DONTNEED)
        if found != record.crc32:
            raise CheckpointError(
                f"{self.path}: record {name!r} differs from its checksum; bits have changed since it was saved"
            )
        self._verified.add(name)

    def verify_tensor(self, tensor: Tensor) -> None:
        """Verify the record that holds a tensor."""
        if tensor.numel():
            self.verify(self._record_of(tensor))

    def is_verified(self, tensor: Tensor) -> bool:
        """Return whether the record that holds a tensor was verified."""
        return not tensor.numel() or self._record_of(tensor) in self._verified

    def _record_of(self, tensor: Tensor) -> str:
        return self._by_start[tensor.untyped_storage().data_ptr() - self._base]

    def count_touched(self, tensor: Tensor) -> None:
        """Count bytes that were read, and release all pages after every CHUNK_BYTES; later reads map them again."""
        self._touched_bytes += tensor.nbytes
        if self._touched_bytes >= CHUNK_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0


def saved_stem(path: Path) -> str:
    """Return the name that a file had when it was saved, without reading its content.

    Raises CheckpointError for a missing, torn or foreign file.
    """
    try:
        with open_regular(path) as file:
            magic, name_length, _ = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            name = file.read(name_length).decode()
            file.seek(-END_BYTES, os.SEEK_END)
            is_whole = magic == LOCAL_MAGIC and file.read(len(END_MAGIC)) == END_MAGIC
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: missing, torn, or not a file of torch.save ({error})") from error
    if not is_whole:
        raise CheckpointError(f"{path}: torn, damaged, or not a file of torch.save")
    return name.partition("/")[0]
