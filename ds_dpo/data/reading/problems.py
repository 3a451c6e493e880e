"""Values of text files and tars that do not fit their column: what they are is stored beside the rows.

A typed column holds null in their place, and the column PROBLEMS a JSON object: by column the reason, or, for a list,
the reasons by place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ds_dpo.data.reading.arrow_values import Unreadable
from ds_dpo.data.reading.rows import RowReader

# Python's stand-in for a byte that is no UTF-8; JSON can spell it too, and means as little by it
BYTE_OF_NO_TEXT = re.compile("[\udc80-\udcff]")
PROBLEMS = "\0problems"  # no program names a column so


def text_or_problem(value: Any, *, wanted: str = "text") -> str | Unreadable | None:
    """Return text or null; for anything else, why it is not what is wanted."""
    if value is None:
        return None
    if not isinstance(value, str):
        return Unreadable(reason=f"{type(value).__name__} instead of {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if BYTE_OF_NO_TEXT.match(value[error.start]):
            return Unreadable(reason=f"text that is not UTF-8: byte {ord(value[error.start]) - 0xDC00:#04x}")
        # JSON can spell it
        return Unreadable(reason="text with half of a surrogate pair, which is not a character")
    return value


def without_problems(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a row with null for each Unreadable, also in lists, and the JSON of its reasons (None without any)."""
    values: dict[str, Any] = {}
    reasons: dict[str, Any] = {}
    for column, value in row.items():
        values[column] = value
        if isinstance(value, Unreadable):
            values[column], reasons[column] = None, value.reason
        elif isinstance(value, list):
            in_list = {place: each.reason for place, each in enumerate(value) if isinstance(each, Unreadable)}
            if in_list:
                values[column] = [None if isinstance(each, Unreadable) else each for each in value]
                reasons[column] = in_list
    return values, json.dumps(reasons) if reasons else None


def with_problems(read_row: RowReader) -> RowReader:
    """Return a reader that gives Unreadable where the rows' PROBLEMS have a reason."""

    def read(row: int) -> Mapping[str, Any]:
        values = dict(read_row(row))
        reasons = values.pop(PROBLEMS, None)
        for column, reason in json.loads(reasons or "{}").items():
            if column not in values:
                continue
            if isinstance(reason, Mapping):
                values[column] = _with_reasons(values[column], reason)
            else:
                values[column] = Unreadable(reason=reason)
        return values

    return read


def _with_reasons(values: Sequence[Any], reasons: Mapping[str, str]) -> list[Any]:
    return [
        Unreadable(reason=reasons[str(place)]) if str(place) in reasons else value for place, value in enumerate(values)
    ]
