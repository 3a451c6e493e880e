"""The one limit on rows that cannot be read: data.max_bad_rows."""

from __future__ import annotations

from collections.abc import Sequence

from ds_dpo.errors import DataError

NUM_ROWS_LISTED = 20


def too_many_bad_rows(rows: Sequence[object], *, limit: int, what: str = "rows") -> DataError | None:
    """Return the error that ends a run once more rows than data.max_bad_rows cannot be read, None until then.

    rows: all that were met so far, which the error lists. what: their name in the message.
    """
    if len(rows) <= limit:
        return None
    listed = [str(row) for row in rows[:NUM_ROWS_LISTED]]
    if len(rows) > NUM_ROWS_LISTED:
        listed.append(f"and {len(rows) - NUM_ROWS_LISTED} more")
    head = f"{len(rows)} {what} cannot be read, and data.max_bad_rows allows {limit}; mend them or raise it:"
    return DataError("\n  ".join([head, *listed]))
