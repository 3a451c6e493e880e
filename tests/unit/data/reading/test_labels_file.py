"""Labels of a file of their own: joined by pair id, whatever the format; what they replace; files that are refused."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from pair_files import config, file_of, picture, row

from ds_dpo.data.reading.labels_file import LABELS_SCHEMA
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import DataError

NAN = float("nan")


def opened(path, **fields):
    fields = {"cache_dir": str(path.parent / "cache"), "ties": "soft"} | fields
    return open_source(config(path, **fields), say=lambda line: None, in_file_order=True)


def write_labels(folder, rows, *, schema=LABELS_SCHEMA):
    path = folder / f"labels_{len(list(folder.glob('labels_*')))}.parquet"
    columns = {name: pa.array([one.get(name) for one in rows], schema.field(name).type) for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path)
    return path


def pickapic(folder):
    Dataset.from_list([row(0), row(1, label_0=0.0), row(2, label_0=0.5), row(3)]).to_parquet(folder / "a.parquet")
    return folder / "a.parquet", {}


def ordered_without_ids(folder):
    rows = [
        {"prompt": f"p{n}", "chosen": file_of(picture(2 * n)), "rejected": file_of(picture(2 * n + 1))}
        for n in range(4)
    ]
    Dataset.from_list(rows).to_parquet(folder / "b.parquet")
    return folder / "b.parquet", {"format": "chosen_rejected"}


def ranked_with_ids(folder):
    images = [file_of(picture(n)) for n in range(3)]
    rows = [
        {"prompt": "p", "images": images, "rank": [2, 1, 3], "name": 7},
        {"prompt": "q", "images": images[:2], "rank": [1, 1], "name": 8},
    ]
    Dataset.from_list(rows).to_parquet(folder / "c.parquet")
    return folder / "c.parquet", {"format": "ranked", "columns": ["id=name"]}


@pytest.mark.parametrize("make", [pickapic, ordered_without_ids, ranked_with_ids])
def test_a_label_reaches_its_pair_in_any_format(tmp_path, make) -> None:
    """All verdicts turned round, in another order: each pair keeps its id, prompt and images, and swaps its sides."""
    path, fields = make(tmp_path)
    before = [opened(path, **fields).read(index) for index in range(4)]
    rows = [
        {"pair_id": pair.pair_id, "label": 0.0 if pair.image_numbers[0] < pair.image_numbers[1] else 1.0}
        for pair in before
    ]
    after = opened(path, labels=str(write_labels(tmp_path, rows[::-1])), **fields)
    for index, old in enumerate(before):
        new = after.read(index)
        assert (new.pair_id, new.prompt) == (old.pair_id, old.prompt)
        assert (new.chosen, new.rejected) == (old.rejected, old.chosen)
        assert new.target_probability == 1


@pytest.fixture
def ids(tmp_path):
    path, _ = pickapic(tmp_path)
    source = opened(path)
    return path, [source.read(index).pair_id for index in range(4)]


def verdicts(source):
    """The number of the chosen image, the target and the weight of each pair."""
    pairs = [source.read(index) for index in range(len(source))]
    return [(pair.image_numbers[0], pair.target_probability, pair.weight) for pair in pairs]


@pytest.mark.parametrize(
    ("labels", "fields", "expected", "counts"),
    [
        # (label, probability) of the four rows; image 0 is that with the lower number
        ([(0, 0.2), (1, 0.9), (1, NAN), (0.5, 0.5)], {}, [(1, 1, 1), (0, 1, 1), (0, 1, 1), (0, 0.5, 1)], {"ties": 1}),
        (
            [(0, 0.25), (1, 0.875), (1, NAN), (0.5, 0.5)],
            {"confidence": "target"},
            [(1, 0.75, 1), (0, 0.875, 1), (0, 1, 1), (0, 0.5, 1)],
            {},
        ),
        (
            [(0, 0.25), (1, 0.875), (1, NAN), (1, 1)],
            {"confidence": "weight"},
            [(1, 1, 0.75), (0, 1, 0.875), (0, 1, 1), (0, 1, 1)],
            {},
        ),
        (
            [(0, 0.25), (1, 0.875), (1, NAN), (1, 0.6)],
            {"min_confidence": 0.75},
            [(1, 1, 1), (0, 1, 1), (0, 1, 1)],
            {"dropped_confidence": 1},
        ),
        (
            [(0.5, 0.5), (1, 1), None, (1, 1)],
            {"ties": "drop"},
            [(0, 1, 1), (0, 1, 1)],
            {"dropped_ties": 1, "dropped_unlabelled": 1},
        ),
    ],
)  # fmt: skip
def test_labels_replace_verdicts_and_confidence(ids, tmp_path, labels, fields, expected, counts) -> None:
    path, pair_ids = ids
    rows = [
        {"pair_id": pair_id, "label": given[0], "probability": given[1]}
        for pair_id, given in zip(pair_ids, labels, strict=True)
        if given is not None
    ]
    # a label for a pair that is not in the data set is no error: the file may cover a larger set
    rows.append({"pair_id": 12345, "label": 1.0, "probability": 1.0})
    source = opened(path, labels=str(write_labels(tmp_path, rows)), **fields)
    assert verdicts(source) == expected
    assert source.counts.items() >= counts.items()
    assert source.counts["rows"] == 4


def test_a_set_with_labels_is_another_set_and_follows_its_file(ids, tmp_path) -> None:
    path, pair_ids = ids
    labels = write_labels(tmp_path, [{"pair_id": pair_id, "label": 1.0} for pair_id in pair_ids])
    first = opened(path, labels=str(labels))
    assert first.fingerprint["pairs"] != opened(path).fingerprint["pairs"]
    labels.write_bytes(write_labels(tmp_path, [{"pair_id": pair_ids[0], "label": 0.0}]).read_bytes())
    assert verdicts(opened(path, labels=str(labels))) == [(1, 1, 1)]


def drop_column(schema, name):
    return pa.schema([field for field in schema if field.name != name])


@pytest.mark.parametrize(
    ("rows", "schema", "message"),
    [
        ([{"pair_id": 1, "label": 1.0}], LABELS_SCHEMA, "has no label for any of its pairs; make the labels with"),
        ([{"pair_id": 1, "label": 0.3}], LABELS_SCHEMA, "label is 0.3 in row 0; 1, 0.5 or 0 would fit"),
        ([{"pair_id": 1, "label": None}], LABELS_SCHEMA, "label is nan in row 0"),
        ([{"pair_id": 1, "label": 1}, {"pair_id": 1, "label": 1}], LABELS_SCHEMA, "rows 0 and 1 have the same pair_id"),
        ([{"pair_id": None, "label": 1.0}], LABELS_SCHEMA, "pair_id is null in row 0"),
        ([{"pair_id": 1, "label": 1.0, "probability": 1.5}], LABELS_SCHEMA, "probability is 1.5 in row 0; 0 to 1"),
        ([{"pair_id": 1}], drop_column(LABELS_SCHEMA, "label"), "has no column label; it has pair_id, uid, margin"),
    ],
)  # fmt: skip
def test_files_that_are_refused(ids, tmp_path, rows, schema, message) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        opened(ids[0], labels=str(write_labels(tmp_path, rows, schema=schema)))
    assert "labels_0.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "cut"])
def test_damaged_files_are_refused_by_name(ids, tmp_path, content) -> None:
    path = tmp_path / "damaged.parquet"
    if content == "cut":
        whole = write_labels(tmp_path, [{"pair_id": int(n), "label": 1.0} for n in np.arange(1000)]).read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged\.parquet"):
        opened(ids[0], labels=str(path))
