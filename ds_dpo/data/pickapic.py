"""Pick-a-Pic and whatever has its columns: parquet of captions, two images each, and which of them people preferred.

Columns: caption; jpg_0, jpg_1 (bytes, {bytes, path} or the `Image` feature); label_0 (float, int or bool): 1 where
image 0 won, 0 where image 1 did, 0.5 or null where nobody did. has_label is not looked at, as in the authors' code.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets import Image as ImageFeature
from numpy.typing import NDArray

from ds_dpo.config import DataConfig
from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.open_dataset import open_split
from ds_dpo.data.source import BadRowError, PairRecord
from ds_dpo.errors import DataError

NEEDED_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
# All three: the cards do not promise that a ranking_id names one row, copies renumber it or leave it constant, and two
# people may have ranked the same two images.
ID_COLUMNS = ("ranking_id", "image_0_uid", "image_1_uid")


class PickAPic:
    """The pairs of one split that somebody won, by index; a PairSource."""

    def __init__(self, data: DataConfig) -> None:
        """Open the split and choose its pairs by the label column alone; no image is decoded.

        Raises DataError where there is no such dataset, split or column, a label is none, `ties` is error and there
        are some, or the number of pairs is not `expected_pairs`.
        """
        self._name = f"{data.dataset}, split {data.split}"
        dataset = _needed_columns(open_split(data), self._name)
        labels = _labels(dataset, self._name)
        has_winner = (labels == 0) | (labels == 1)
        self._rows: NDArray[np.int64] = np.flatnonzero(has_winner)
        self._dataset = dataset
        num_ties = len(labels) - len(self._rows)
        self._description = f"{self._name}: {len(labels)} rows, {num_ties} ties, {len(self._rows)} pairs"
        if num_ties and data.ties == "error":
            first = int(np.flatnonzero(~has_winner)[0])
            raise DataError(
                f"{self._name}: {num_ties} of {len(labels)} rows are ties, the first is row {first}; data.ties is "
                "error, drop would leave them out"
            )
        if not len(self._rows):
            raise DataError(f"{self._description}; there is nothing to train on")
        if data.expected_pairs is not None and data.expected_pairs != len(self._rows):
            raise DataError(f"{self._description}; data.expected_pairs is {data.expected_pairs}")

    @property
    def description(self) -> str:
        """Rows, ties dropped, and pairs, for the log."""
        return self._description

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> PairRecord:
        """Return a pair, its images as they are stored. Raises BadRowError where the caption is not text."""
        row_number = int(self._rows[index])
        row = self._dataset[row_number]
        parts = [row.get(column) for column in ID_COLUMNS]
        own_id = None if None in parts else " ".join(map(str, parts))
        uid = f"row {row_number} of {self._name}" + ("" if own_id is None else f" (ranking_id {parts[0]})")
        if not isinstance(row["caption"], str):
            raise BadRowError(uid, f"caption: {type(row['caption']).__name__} instead of text")
        is_first_chosen = row["label_0"] == 1
        return PairRecord(
            prompt=row["caption"],
            chosen=row["jpg_0" if is_first_chosen else "jpg_1"],
            rejected=row["jpg_1" if is_first_chosen else "jpg_0"],
            pair_id=id_of(own_id if own_id is not None else f"row {row_number} of {self._name}"),
            uid=uid,
        )


def _needed_columns(dataset: Dataset, name: str) -> Dataset:
    """Return only the columns that are read: a row's others cost time, and `Image` features would decode here."""
    missing = [column for column in NEEDED_COLUMNS if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}, and "
            f"{', '.join(NEEDED_COLUMNS)} are needed"
        )
    dataset = dataset.with_format(None)
    for column in ("jpg_0", "jpg_1"):
        if isinstance(dataset.features[column], ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    ids = ID_COLUMNS if set(ID_COLUMNS) <= set(dataset.column_names) else ()
    return dataset.select_columns([*NEEDED_COLUMNS, *ids])


def _labels(dataset: Dataset, name: str) -> NDArray[np.float64]:
    """Return label_0 of all rows, 0.5 for null; raises DataError for a label that says nothing about a winner."""
    column = dataset.select_columns(["label_0"]).with_format("arrow")[:].column("label_0")
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise DataError(f"{name}: label_0 is {column.type}; a number or bool would fit: 1, 0, or 0.5 for a tie")
    labels = pc.fill_null(pc.cast(column, pa.float64()), 0.5).to_numpy()
    labels = np.where(np.isnan(labels), 0.5, labels)
    unknown = np.flatnonzero(~np.isin(labels, (0, 0.5, 1)))
    if len(unknown):
        raise DataError(
            f"{name}: label_0 is {labels[unknown[0]]:g} in row {unknown[0]}, and no label in {len(unknown)} rows; "
            "1 (image 0 won), 0 (image 1 won) or 0.5 (tie) would fit"
        )
    return labels
