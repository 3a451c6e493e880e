"""Sizes of columns in a parquet file's footer, read here: pyarrow aborts the process over some damaged column chunks.

`pyarrow.parquet.RowGroupMetaData.column` calls C++ that may throw, without catching it. A footer is Thrift in its
compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md, with the structs of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.outside import open_regular

MAGIC = b"PAR1"
LENGTH_BYTES = 4
MAX_DEPTH = 16
VARINT_BYTES = 10
# types of the compact protocol
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
INTEGERS = frozenset({4, 5, 6})

# fields that are read, by number, of structs in structs: row groups, their columns, the metadata of each
ROW_GROUPS, COLUMNS, METADATA, PATH, UNCOMPRESSED_BYTES = 4, 1, 3, 3, 6
Wanted = Mapping[int, Any]
WANTED: Wanted = {ROW_GROUPS: {COLUMNS: {METADATA: {PATH: None, UNCOMPRESSED_BYTES: None}}}}


def column_bytes(path: Path) -> dict[str, int]:
    """Return the unpacked bytes of each column by its path, and by the first part of its path for nested ones.

    Raises OSError, and ValueError for a footer that makes no sense.
    """
    footer = _Compact(_footer(path)).struct(WANTED, depth=0)
    sizes: Counter[str] = Counter()
    for group in _structs(footer.get(ROW_GROUPS, [])):
        for chunk in _structs(group.get(COLUMNS, [])):
            metadata = chunk.get(METADATA, {})
            parts, num_bytes = metadata.get(PATH, []), metadata.get(UNCOMPRESSED_BYTES, 0)
            if not isinstance(parts, list) or not isinstance(num_bytes, int):
                raise ValueError("a column chunk of its footer has fields of other types")
            name = ".".join(part.decode("utf-8", "replace") for part in parts if isinstance(part, bytes))
            # a column's own name may hold a dot, and then it is the whole path of its only leaf
            for column in {name, name.split(".")[0]}:
                sizes[column] += max(0, num_bytes)
    return dict(sizes)


def _structs(values: Any) -> list[dict[int, Any]]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("its footer has other values where structs would fit")
    return values


def _footer(path: Path) -> bytes:
    with open_regular(path) as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - LENGTH_BYTES - len(MAGIC)))
        tail = file.read()
        length = int.from_bytes(tail[:LENGTH_BYTES], "little")
        if tail[LENGTH_BYTES:] != MAGIC or length > end - len(tail) - len(MAGIC):
            raise ValueError("its footer is not that of a parquet file")
        file.seek(end - len(tail) - length)
        return file.read(length)


class _Compact:
    """Reads values of the compact protocol one after the other. Raises ValueError for what cannot be one."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 0

    def struct(self, wanted: Wanted | None, *, depth: int) -> dict[int, Any]:
        """Return the wanted fields of a struct by number, in lists also those of its structs; the rest is passed."""
        if depth > MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            is_wanted = wanted is not None and number in wanted
            inner = wanted[number] if wanted is not None and is_wanted else None
            value = self._value(header & 15, inner, depth=depth + 1, in_list=False)
            if is_wanted:
                found[number] = value
        return found

    def _value(self, type_: int, wanted: Wanted | None, *, depth: int, in_list: bool) -> Any:
        if type_ in INTEGERS:
            return self._integer()
        if type_ in (TRUE, FALSE):
            return self._byte() == TRUE if in_list else type_ == TRUE
        if type_ == BYTE:
            return self._byte()
        if type_ == BINARY:
            return self._bytes(self._varint())
        if type_ == DOUBLE:
            return self._bytes(8)
        if type_ == STRUCT:
            return self.struct(wanted, depth=depth)
        if type_ in (LIST, SET):
            header = self._byte()
            number = self._number(self._varint() if header >> 4 == 15 else header >> 4)
            return [self._value(header & 15, wanted, depth=depth + 1, in_list=True) for _ in range(number)]
        if type_ == MAP:
            return self._map(wanted, depth=depth)
        raise ValueError(f"its footer has a value of unknown type {type_}")

    def _map(self, wanted: Wanted | None, *, depth: int) -> list[Any]:
        number = self._number(self._varint())
        types = self._byte() if number else 0
        return [
            self._value(type_, wanted, depth=depth + 1, in_list=True)
            for _ in range(number)
            for type_ in (types >> 4, types & 15)
        ]

    def _number(self, number: int) -> int:
        if number > len(self._content) - self._place:  # each value takes a byte or more
            raise ValueError("its footer is cut short")
        return number

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        for place in range(VARINT_BYTES):
            byte = self._byte()
            value |= (byte & 127) << (7 * place)
            if byte < 128:
                return value
        raise ValueError("its footer has a number of too many bytes")

    def _byte(self) -> int:
        if self._place >= len(self._content):
            raise ValueError("its footer is cut short")
        self._place += 1
        return self._content[self._place - 1]

    def _bytes(self, number: int) -> bytes:
        start, self._place = self._place, self._place + self._number(number)
        return self._content[start : self._place]
