"""The pairs in a dataset's rows before any filter, found from labels, ranks or scores; no image is read.

Legend: R rows, C candidates, in file order. A row's images are numbered from 0; if each row is one image of a group,
the numbers continue over the following rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ds_dpo.data.selection.column_types import is_list
from ds_dpo.data.selection.formats import Columns
from ds_dpo.errors import DataError

MAX_IMAGE_NUMBER = np.iinfo(np.uint16).max
MAX_INTEGER = 2**53
IS_LOWER_BETTER = {"rank": True, "score": False, "preference": False}


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs that rows name. row: (C,) int64. first, second: (C,) uint16, numbers of the better and the other image.

    is_tie: (C,) bool. In a tie, first is the image with the lower number. confidence: (C,) float64, NaN if unknown, if
    data.labels replaces the rows' own; else None.
    """

    row: NDArray[np.int64]
    first: NDArray[np.uint16]
    second: NDArray[np.uint16]
    is_tie: NDArray[np.bool_]
    confidence: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def keep(self, kept: NDArray[np.bool_]) -> Candidates:
        """Return the candidates for which a (C,) mask is true."""
        return Candidates(
            row=self.row[kept],
            first=self.first[kept],
            second=self.second[kept],
            is_tie=self.is_tie[kept],
            confidence=None if self.confidence is None else self.confidence[kept],
        )


def is_grouped(schema: pa.Schema, columns: Columns) -> bool:
    """Whether each row is one image of a group, rather than all images of it."""
    column = columns.of_role.get("images")
    return column is not None and not is_list(schema.field(column).type)


def columns_of_candidates(schema: pa.Schema, columns: Columns) -> list[str]:
    """Return the columns that find_candidates needs."""
    verdicts = {"labelled": ["label"], "ordered": []}.get(columns.layout, [columns.layout])
    roles = [*verdicts, *(["group"] if is_grouped(schema, columns) else [])]
    return [columns.of_role[role] for role in roles if role in columns.of_role]


def find_candidates(table: pa.Table, columns: Columns, *, num_rows: int, grouped: bool, name: str) -> Candidates:
    """Return the pairs of num_rows rows. table: the columns named by columns_of_candidates.

    Raises DataError that names the row of an unusable label, rank or score.
    """
    if columns.layout == "ordered":
        return _two_of_each_row(np.ones(num_rows, bool), np.zeros(num_rows, bool))
    if columns.layout == "labelled":
        labels = read_labels(table.column(columns.of_role["label"]), columns.of_role["label"], name)
        return _two_of_each_row(labels != 0, labels == 0.5)
    column = columns.of_role[columns.layout]
    if not grouped:
        return _within_rows(table.column(column), column, IS_LOWER_BETTER[columns.layout], name)
    if "group" not in columns.of_role:
        raise DataError(
            f"{name}: each row has one image ({columns.of_role['images']}), and no column says which images belong "
            "together; name one with data.columns, such as group=prompt_id"
        )
    if is_list(table.column(column).type):
        raise DataError(f"{name}: {column} has a list in each row, and {columns.of_role['images']} one image")
    groups = table.column(columns.of_role["group"])
    if pa.types.is_nested(groups.type):
        raise DataError(
            f"{name}: {columns.of_role['group']} is {groups.type}, and says which images belong together; a text or a "
            "number in each row would fit"
        )
    return _within_groups(
        as_numbers(table.column(column), column, name),
        groups,
        column,
        IS_LOWER_BETTER[columns.layout],
        name,
    )


def rows_of_no_pair(table: pa.Table, columns: Columns, *, grouped: bool) -> NDArray[np.int64]:
    """Return the rows whose list of ranks, scores or preferences has fewer than two of them, so that it makes no pair.

    table: as in find_candidates, which has accepted it.
    """
    if columns.layout in ("labelled", "ordered") or grouped:
        return np.empty(0, dtype=np.int64)
    lengths = pc.list_value_length(table.column(columns.of_role[columns.layout]).combine_chunks())
    return np.flatnonzero(np.asarray(lengths) < 2)


def with_unranked(candidates: Candidates, rows: NDArray[np.int64]) -> Candidates:
    """Add a candidate, of images 0 and 1, for each of the rows: reading it finds the row bad, as its ranks are too few.

    Raises nothing. Candidates stay in file order.
    """
    order = np.argsort(np.concatenate([candidates.row, rows]), kind="stable")
    added = np.zeros(len(rows), dtype=np.uint16)
    return Candidates(
        row=np.concatenate([candidates.row, rows])[order],
        first=np.concatenate([candidates.first, added])[order],
        second=np.concatenate([candidates.second, added + np.uint16(1)])[order],
        is_tie=np.concatenate([candidates.is_tie, added.astype(bool)])[order],
    )


def read_labels(column: pa.ChunkedArray, column_name: str, name: str) -> NDArray[np.float64]:
    """Return labels (R,): 1, 0, or 0.5 for null. Raises DataError for any other label."""
    labels = as_numbers(column, column_name, name)
    labels = np.where(np.isnan(labels), 0.5, labels)
    unknown = np.flatnonzero(~np.isin(labels, (0, 0.5, 1)))
    if len(unknown):
        raise DataError(
            f"{name}: {column_name} is {labels[unknown[0]]:g} in row {unknown[0]}; {len(unknown)} rows have no usable "
            "label; 1 (image 0 won), 0 (image 1 won) or 0.5 (tie) would fit"
        )
    return labels


def as_numbers(
    column: pa.ChunkedArray | pa.Array, column_name: str, name: str, *, starts: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return a column of numbers or bools as float64, NaN for null.

    starts: place of each row's first number, if a row has several. Raises DataError that names the row of an integer
    beyond 2**53, which float64 would round.
    """
    if pa.types.is_integer(column.type):
        integers = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
        # not by abs: the least int64 has none
        large = np.flatnonzero((integers > MAX_INTEGER) | (integers < -MAX_INTEGER))
        if len(large):
            place = int(large[0])
            row = place if starts is None else int(np.searchsorted(starts, place, side="right")) - 1
            raise DataError(f"{name}: {column_name} is {integers[place]} in row {row}; a number up to 2**53 would fit")
    return np.asarray(pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy(zero_copy_only=False))


def _two_of_each_row(is_first_better: NDArray[np.bool_], is_tie: NDArray[np.bool_]) -> Candidates:
    return Candidates(
        row=np.arange(len(is_tie)),
        first=np.where(is_first_better, 0, 1).astype(np.uint16),
        second=np.where(is_first_better, 1, 0).astype(np.uint16),
        is_tie=is_tie,
    )


def _within_rows(column: pa.ChunkedArray, column_name: str, is_lower_better: bool, name: str) -> Candidates:
    """Compare all images of each row with each other. column: a list of numbers in each row."""
    if not is_list(column.type):
        raise DataError(f"{name}: {column_name} is {column.type}; a list of numbers, one for each image, would fit")
    lists = column.combine_chunks()
    if lists.null_count:
        row = int(np.flatnonzero(np.asarray(lists.is_null()))[0])
        raise DataError(f"{name}: {column_name} is null in row {row}; a list of numbers would fit")
    lengths = np.asarray(pc.list_value_length(lists)).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    values = as_numbers(pc.list_flatten(lists), column_name, name, starts=starts)
    if np.isnan(values).any():
        value = int(np.flatnonzero(np.isnan(values))[0])
        row = int(np.searchsorted(starts, value, side="right")) - 1
        raise DataError(f"{name}: {column_name} has a null in row {row}; a number for each image would fit")
    left, right = _pairs_within(starts, lengths)
    rows = np.repeat(np.arange(len(lengths)), lengths * (lengths - 1) // 2)
    return _compare(values, left, right, rows, offsets=starts[rows], is_lower_better=is_lower_better, name=name)


def _within_groups(
    values: NDArray[np.float64], groups: pa.ChunkedArray, column_name: str, is_lower_better: bool, name: str
) -> Candidates:
    """Compare all rows of each group with each other; a candidate belongs to the earlier of its two rows."""
    for what, is_missing in ((column_name, np.isnan(values)), ("the group", np.asarray(groups.is_null()))):
        if is_missing.any():
            raise DataError(f"{name}: {what} is null in row {int(np.flatnonzero(is_missing)[0])}")
    codes = codes_of(groups)
    order = np.argsort(codes, kind="stable")  # rows of a group together, in file order
    lengths = np.bincount(codes).astype(np.int64)
    left, right = _pairs_within(np.cumsum(lengths) - lengths, lengths)
    left, right = order[left], order[right]
    in_file_order = np.lexsort((right, left))
    left, right = left[in_file_order], right[in_file_order]
    return _compare(values, left, right, left, offsets=left, is_lower_better=is_lower_better, name=name)


def codes_of(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the number of each row's value: distinct values are counted in order of appearance, nulls share one."""
    encoded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    return np.asarray(encoded.indices).astype(np.int64)


def _pairs_within(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of both members of every pair within each run of positions, run after run."""
    num_pairs = lengths * (lengths - 1) // 2
    pair_starts = np.cumsum(num_pairs) - num_pairs
    left = np.empty(int(num_pairs.sum()), dtype=np.int64)
    right = np.empty_like(left)
    for length in np.unique(lengths[lengths > 1]):
        of_this_length = np.flatnonzero(lengths == length)
        first, second = np.triu_indices(int(length), k=1)
        places = pair_starts[of_this_length][:, None] + np.arange(len(first))
        left[places] = starts[of_this_length][:, None] + first
        right[places] = starts[of_this_length][:, None] + second
    return left, right


def _compare(
    values: NDArray[np.float64],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    row: NDArray[np.int64],
    *,
    offsets: NDArray[np.int64],
    is_lower_better: bool,
    name: str,
) -> Candidates:
    """Find the better of two positions. An image's number is its position minus its row's offset."""
    if is_lower_better:
        values = -values
    is_left_better = values[left] >= values[right]
    first = np.where(is_left_better, left, right) - offsets
    second = np.where(is_left_better, right, left) - offsets
    if len(row) and int(max(first.max(), second.max())) > MAX_IMAGE_NUMBER:
        far = int(row[np.argmax(np.maximum(first, second))])
        raise DataError(
            f"{name}: images that are compared with that of row {far} are more than {MAX_IMAGE_NUMBER} rows after it; "
            "sort the rows by group"
        )
    return Candidates(
        row=row,
        first=first.astype(np.uint16),
        second=second.astype(np.uint16),
        is_tie=values[left] == values[right],
    )


def model_numbers(
    table: pa.Table, columns: Mapping[str, str], candidates: Candidates, *, grouped: bool, name: str
) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
    """Return names of models, and each candidate's positions in them: of the first and of the second image's model.

    Raises DataError if a row names fewer models than it has images.
    """
    first, second = candidates.first.astype(np.int64), candidates.second.astype(np.int64)
    if "models" not in columns:
        names = pa.concat_arrays(
            [table.column(columns[role]).combine_chunks().cast(pa.string()) for role in ("model_0", "model_1")]
        )
        return names, candidates.row + first * len(table), candidates.row + second * len(table)
    lists = table.column(columns["models"]).combine_chunks()
    if grouped:
        return lists, candidates.row + first, candidates.row + second
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    short = np.flatnonzero(np.maximum(first, second) >= lengths[candidates.row])
    if len(short):
        raise DataError(f"{name}: {columns['models']} has fewer models than images in row {candidates.row[short[0]]}")
    starts = (np.cumsum(lengths) - lengths)[candidates.row]
    return pc.list_flatten(lists), starts + first, starts + second
