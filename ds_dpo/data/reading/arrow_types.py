"""The type in which a role's column is read: dictionaries decoded, and the types of a split's files made one.

A parquet file has the types of the program that wrote it, and the files of a split may come from several programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
from pyarrow import types

# the fields of an image that is stored as a struct; others are not read
IMAGE_FIELDS = ("bytes", "path")


def plain_type(type_: pa.DataType, kind: str) -> pa.DataType:
    """Return the type in which values of a column are read. kind: of the role, as in KIND_OF_ROLE."""
    if types.is_dictionary(type_):
        return plain_type(type_.value_type, kind)
    if isinstance(type_, pa.UuidType):
        return pa.string()
    if isinstance(type_, pa.BaseExtensionType):
        return plain_type(type_.storage_type, kind)
    if is_some_list(type_):
        return _list_like(type_, plain_type(type_.value_type, kind))
    if types.is_struct(type_) and kind.startswith("image"):
        fields = [field for field in type_ if field.name in IMAGE_FIELDS]
        return pa.struct([(field.name, plain_type(field.type, kind)) for field in fields]) if fields else type_
    if types.is_string_view(type_):
        return pa.large_string()
    if types.is_binary_view(type_):
        return pa.large_binary()
    if types.is_fixed_size_binary(type_) and kind.startswith("image"):
        return pa.binary()
    if types.is_decimal(type_) and kind.startswith("number"):
        return pa.float64()
    return type_


def one_type(found: Sequence[pa.DataType], kind: str) -> pa.DataType | None:
    """Return the type to which values of all types can be converted without loss of what they say, or None.

    found: plain types. A column that is null throughout fits any type. Numbers become float64, unless they are ids.
    """
    known = list(dict.fromkeys(type_ for type_ in found if not types.is_null(type_)))
    if len(known) <= 1:
        return known[0] if known else pa.null()
    for fits, wide in WIDE_TYPES.get(kind.removesuffix("s"), {}).items():
        if all(map(fits, known)):
            return wide
    if all(map(is_some_list, known)):
        values = one_type([type_.value_type for type_ in known], kind)
        return None if values is None else pa.large_list(values)
    if all(map(types.is_struct, known)):
        return _one_struct(known, kind)
    return None


def is_some_list(type_: pa.DataType) -> bool:
    """Whether values are lists, however Arrow stores them."""
    return any(
        is_one(type_)
        for is_one in (
            types.is_list,
            types.is_large_list,
            types.is_fixed_size_list,
            types.is_list_view,
            types.is_large_list_view,
        )
    )


def _list_like(type_: pa.DataType, values: pa.DataType) -> pa.DataType:
    if types.is_list(type_) or types.is_fixed_size_list(type_):
        return type_ if values == type_.value_type else pa.list_(values)
    return pa.large_list(values)


def _one_struct(known: Sequence[pa.DataType], kind: str) -> pa.DataType | None:
    fields: dict[str, list[pa.DataType]] = {}
    for type_ in known:
        for field in type_:
            fields.setdefault(field.name, []).append(field.type)
    merged = {name: one_type(of_name, kind) for name, of_name in fields.items()}
    if None in merged.values():
        return None
    return pa.struct(list(merged.items()))


def _is_text(type_: pa.DataType) -> bool:
    return bool(types.is_string(type_) or types.is_large_string(type_))


def _is_bytes(type_: pa.DataType) -> bool:
    return bool(types.is_binary(type_) or types.is_large_binary(type_))


def _is_number(type_: pa.DataType) -> bool:
    return bool(types.is_floating(type_) or types.is_integer(type_) or types.is_boolean(type_))


# kind of a role -> whether types are of one sort, and the type that holds them all. An id that became a float would
# have another text, and so other noise
WIDE_TYPES: Mapping[str, Mapping[Callable[[pa.DataType], bool], pa.DataType]] = {
    "text": {_is_text: pa.large_string()},
    "image": {_is_text: pa.large_string(), _is_bytes: pa.large_binary()},
    "number": {_is_number: pa.float64()},
    "name": {_is_text: pa.large_string(), types.is_integer: pa.int64()},
}
