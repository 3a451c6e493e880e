"""Types of columns: which Arrow types can be read for a role."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa

from ds_dpo.data.selection.formats import KIND_OF_ROLE, Columns
from ds_dpo.errors import DataError


def is_list(type_: pa.DataType) -> bool:
    """Whether a column has a list in each row."""
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def is_number(type_: pa.DataType) -> bool:
    """Whether a column has a number or a bool in each row; a column that is always null counts too."""
    is_some = pa.types.is_floating(type_) or pa.types.is_integer(type_) or pa.types.is_boolean(type_)
    return bool(is_some or pa.types.is_null(type_))


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_null(type_))


def _is_image(type_: pa.DataType) -> bool:
    is_bytes = pa.types.is_binary(type_) or pa.types.is_large_binary(type_)
    return bool(is_bytes or pa.types.is_struct(type_) or _is_text(type_))


def _is_any(type_: pa.DataType) -> bool:
    return True


# kind of a role -> whether a type fits one value, and what would fit
CHECKS: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "text": (_is_text, "text"),
    "image": (_is_image, "image bytes, {bytes, path} or a path"),
    "number": (is_number, "a number or bool"),
    "name": (_is_any, "anything"),
}


def require_types(schema: pa.Schema, columns: Columns, name: str) -> None:
    """Raise DataError for the first column whose type does not fit its role."""
    for role, column in columns.of_role.items():
        kind, type_ = KIND_OF_ROLE[role], schema.field(column).type
        takes_lists = kind in ("texts", "images", "numbers")
        fits, what = CHECKS[kind.removesuffix("s") if takes_lists else kind]
        if not fits(type_.value_type if takes_lists and is_list(type_) else type_):
            label = ": 1, 0, or 0.5 for a tie" if role == "label" else ""
            raise DataError(
                f"{name}: {column} is {type_}; {what}{', or a list of them,' if takes_lists else ''} would fit{label}"
            )
