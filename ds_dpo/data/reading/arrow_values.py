"""Values of Arrow columns: converted to another type, and read one by one, whatever is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Stands for a value that is there and cannot be used; its row is a bad one if the value is needed."""

    reason: str


def read_value(value: pa.Scalar) -> Any:
    """Return a value of Arrow as one of Python, or Unreadable if it has none, such as text that is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(reason=f"text that is not UTF-8: {error.reason} at byte {error.start}")
    # out of range for Python's type, or of a type that is not installed
    except (ValueError, TypeError, ArithmeticError, LookupError, ImportError, pa.ArrowException) as error:
        return Unreadable(reason=f"a value of type {value.type} that cannot be read ({type(error).__name__})")


def as_type(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """Return an array of another type, of those that arrow_types gives. Raises pa.ArrowException for a lost value."""
    if array.type == type_:
        return array
    if isinstance(array.type, pa.UuidType):
        return pa.array([None if value is None else str(value) for value in array.to_pylist()], type_)
    if isinstance(array, pa.ExtensionArray):
        return as_type(array.storage, type_)
    if types.is_dictionary(array.type):
        return as_type(array.dictionary_decode(), type_)
    if types.is_struct(type_) and types.is_struct(array.type):
        return _as_struct(array, type_)
    if _is_list(type_) and _is_list(array.type):
        return _as_list(array, type_)
    # integers beyond 2**53 may be rounded: no label, rank or confidence is that large
    return pc.cast(array, type_, safe=not types.is_floating(type_))


def readable_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of text without bytes that are not UTF-8: they are replaced. Other columns are unchanged."""
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        return column
    return pa.chunked_array([_readable(chunk) for chunk in column.chunks], column.type)


def _readable(chunk: pa.Array) -> pa.Array:
    try:
        chunk.validate(full=True)
    except pa.ArrowInvalid:
        as_bytes = chunk.cast(pa.large_binary()).to_pylist()
        return pa.array([None if each is None else each.decode(errors="replace") for each in as_bytes], chunk.type)
    return chunk


def _is_list(type_: pa.DataType) -> bool:
    return bool(types.is_list(type_) or types.is_large_list(type_))


def _as_struct(array: pa.StructArray, type_: pa.DataType) -> pa.Array:
    there = {field.name for field in array.type}
    columns = [
        as_type(array.field(field.name), field.type) if field.name in there else pa.nulls(len(array), field.type)
        for field in type_
    ]
    return pa.StructArray.from_arrays(columns, fields=list(type_), mask=array.is_null())


def _as_list(array: pa.Array, type_: pa.DataType) -> pa.Array:
    values = as_type(array.flatten(), type_.value_type)
    lengths = pc.fill_null(pc.list_value_length(array), 0)
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(lengths.cast(pa.int64()))])
    kind = pa.LargeListArray if types.is_large_list(type_) else pa.ListArray
    width = pa.int64() if types.is_large_list(type_) else pa.int32()
    return kind.from_arrays(offsets.cast(width), values, type=type_, mask=array.is_null())
