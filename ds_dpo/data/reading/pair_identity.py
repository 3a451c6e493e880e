"""The name and the id of a pair, which do not depend on where its row is stored or on which image was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.reading.arrow_values import Unreadable
from ds_dpo.data.selection.candidates import Candidates
from ds_dpo.data.selection.formats import Columns
from ds_dpo.data.source import BadRowError
from ds_dpo.errors import cut

PICKAPIC_ID = ("ranking_id", "image_0_id", "image_1_id")
ID_ROLES = ("id", *PICKAPIC_ID)
IMAGE_ROLES: Mapping[str, tuple[str, str]] = {"labelled": ("image_0", "image_1"), "ordered": ("chosen", "rejected")}


def pair_identity(
    values: Mapping[str, Any], columns: Columns, *, row: int, first: int, second: int, name: str
) -> tuple[str, str]:
    """Return a pair's name for messages, and the text for its id.

    values: of the row, by role; only those of ID_ROLES are looked at. first, second: numbers of its images. name: of
    the data set and split. Raises BadRowError for an id that is there and cannot be read.
    """
    lower, higher = sorted((first, second))
    which = "" if columns.layout in IMAGE_ROLES else f" {lower} {higher}"
    place = f"row {row} of {name}" + (f", images {lower} and {higher}" if which else "")
    for role in ID_ROLES:
        if isinstance(broken := values.get(role), Unreadable):
            raise BadRowError(place, f"{columns.of_role[role]}: {broken.reason}")
    if values.get("id") is not None:
        return f"{place} (id {cut(str(values['id']))})", f"{values['id']}{which}"
    parts = [values.get(role) for role in PICKAPIC_ID]
    if None not in parts:
        return f"{place} (ranking_id {cut(str(parts[0]))})", " ".join(map(str, parts))
    return place, place


def has_own_ids(columns: Columns) -> bool:
    """Whether the rows have ids of their own; else a pair's id is made of its row number and the data set's name."""
    return "id" in columns.of_role or set(PICKAPIC_ID) <= columns.of_role.keys()


def columns_of_ids(columns: Columns) -> list[str]:
    """Return the columns that `candidate_ids` needs."""
    return [columns.of_role[role] for role in ID_ROLES if role in columns.of_role]


def candidate_ids(table: pa.Table, columns: Columns, candidates: Candidates, *, name: str) -> NDArray[np.int64]:
    """Return the pair id of each candidate, (C,): the one that reading the pair gives.

    table: all rows of at least columns_of_ids. name: of the data set and split.
    """
    roles = [role for role in ID_ROLES if role in columns.of_role]
    values = {role: table.column(columns.of_role[role]).to_pylist() for role in roles}
    ids = np.empty(len(candidates), dtype=np.int64)
    for place, (row, first, second) in enumerate(
        zip(candidates.row.tolist(), candidates.first.tolist(), candidates.second.tolist(), strict=True)
    ):
        of_row = {role: column[row] for role, column in values.items()}
        _, text = pair_identity(of_row, columns, row=row, first=first, second=second, name=name)
        ids[place] = id_of(text)
    return ids
