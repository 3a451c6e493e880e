"""The limit on rows that cannot be read: data.max_bad_rows."""

from __future__ import annotations

from collections.abc import Sequence

from ds_dpo.errors import DataError

NUM_ROWS_LISTED = 20


def too_many_bad_rows(rows: Sequence[object], *, limit: int, what: str = "rows") -> DataError | None:
    """Return the error that ends a run if more rows than the limit cannot be read, else None.

    rows: all bad rows so far, which the error lists. limit: data.max_bad_rows. what: their name in the message.
    """
    if len(rows) <= limit:
        return None
    listed = [str(row) for row in rows[:NUM_ROWS_LISTED]]
    if len(rows) > NUM_ROWS_LISTED:
        listed.append(f"and {len(rows) - NUM_ROWS_LISTED} more")
    head = f"{len(rows)} {what} cannot be read, but data.max_bad_rows allows {limit}; repair them, or raise the limit:"
    return DataError("\n  ".join([head, *listed]))
