"""Numbers that float64 would round, and groups that are no plain values, are refused with column and row."""

import pyarrow as pa
import pytest
from pair_files import config, file_of, picture
from shard_writers import columns_of, write

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import DataError

LARGEST = 2**53  # of those up to which every integer is a float64
IMAGES = [file_of(picture(number)) for number in range(4)]


def grouped(**columns):
    return {"prompt": pa.array(["p"] * 4), "image": pa.array(IMAGES), **columns}


def in_lists(ranks):
    images = [IMAGES[:2], IMAGES[2:]]
    return {"prompt": pa.array(["p", "q"]), "images": pa.array(images), "rank": pa.array(ranks, pa.list_(pa.int64()))}


NESTED = pa.array([{"a": 1}] * 4)
CASES = {
    "label": (
        "pickapic",
        columns_of(label_0=pa.array([1, 0, LARGEST + 1, 1])),
        {},
        "label_0 is 9007199254740993 in row 2",
    ),
    "least label": (
        "pickapic",
        columns_of(label_0=pa.array([-(2**63), 0, 1, 1])),
        {},
        "label_0 is -9223372036854775808 in row 0",
    ),
    "confidence": (
        "pickapic",
        columns_of(confidence=pa.array([1, 2, 3, 2**64 - 1], pa.uint64())),
        {"min_confidence": 1.0},
        f"confidence is {2**64 - 1} in row 3",
    ),
    "ranks": ("ranked", in_lists([[1, 2], [1, -LARGEST - 1]]), {}, f"rank is {-LARGEST - 1} in row 1"),
    "rank of a group": (
        "ranked",
        grouped(group=pa.array([0] * 4), rank=pa.array([1, LARGEST + 1, 2, 3])),
        {},
        f"rank is {LARGEST + 1} in row 1",
    ),
    "group of structs": ("ranked", grouped(group=NESTED, rank=pa.array([1, 2, 3, 4])), {}, "group is struct<a: int64>"),
    "group of lists": (
        "ranked",
        grouped(group=pa.array([[1]] * 4), rank=pa.array([1, 2, 3, 4])),
        {},
        "group is list<element: int64>, and says which images belong together; a text or a number in each row would",
    ),
}


def opened(tmp_path, columns, *, in_file_order, **fields):
    path = write(tmp_path / "x.parquet", columns)
    data = config(path, cache_dir=str(tmp_path / "cache"), **fields)
    return open_source(data, say=lambda line: None, in_file_order=in_file_order)


@pytest.mark.parametrize("in_file_order", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_value_that_cannot_be_compared_is_refused(case, in_file_order, tmp_path):
    format_, columns, fields, message = CASES[case]
    with pytest.raises(DataError) as caught:
        opened(tmp_path, columns, in_file_order=in_file_order, format=format_, **fields)
    assert message in str(caught.value)
    assert "would fit" in str(caught.value)


def test_the_largest_and_missing_numbers_are_read(tmp_path):
    ranks = opened(tmp_path, in_lists([[LARGEST, -LARGEST], [1, 2]]), in_file_order=True, format="ranked")
    assert [ranks.read(index).chosen for index in (0, 1)] == [IMAGES[1], IMAGES[2]]
    labels = pa.array([1, None, 0, 1], pa.uint8())
    assert opened(tmp_path, columns_of(label_0=labels), in_file_order=True).counts["ties"] == 1


def test_a_nested_group_that_no_one_needs_is_metadata(tmp_path):
    columns = in_lists([[1, 2], [2, 1]]) | {"group": NESTED[:2]}
    assert opened(tmp_path, columns, in_file_order=True, format="ranked").read(0).metadata["group"] == {"a": 1}
