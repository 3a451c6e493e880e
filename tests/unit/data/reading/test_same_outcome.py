"""Columns as real programs write them: training and the programs that read straight from the files have one outcome."""

import decimal
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from both_ways import BOTH, FIRST, opened, require_one_outcome
from datasets import Dataset
from pair_files import file_of, picture
from shard_writers import NUM_ROWS, columns_of, write, write_shards

from ds_dpo.data.source import BadRowError
from ds_dpo.errors import DataError


def numbers(values, type_=None):
    return pa.array(values, type_)


def label_missing(folder):
    write_shards(folder, columns_of(), columns_of(NUM_ROWS, label_0=None))
    return (
        folder,
        {},
        r"/train-00001-of-00002\.parquet has no column label_0, and train-00000-of-00002\.parquet has one",
    )


def caption_missing_in_the_first(folder):
    write_shards(folder, columns_of(caption=None), columns_of(NUM_ROWS))
    return (
        folder,
        {},
        r"/train-00000-of-00002\.parquet has no column caption, and train-00001-of-00002\.parquet has one",
    )


def confidence_missing(folder):
    write_shards(folder, columns_of(confidence=numbers([0.1] * 4)), columns_of(NUM_ROWS))
    return folder, {"min_confidence": 0.5}, r"/train-00001-of-00002\.parquet has no column confidence"


def unused_missing(folder):
    write_shards(folder, columns_of(aesthetic=numbers([1, 2, 3, 4])), columns_of(NUM_ROWS))
    return folder, {}, BOTH


def empty_shard(folder):
    empty = {name: column[:0] for name, column in columns_of().items()}
    write_shards(folder, columns_of(), empty, columns_of(NUM_ROWS))
    return folder, {}, BOTH


def empty_shard_of_other_types(folder):
    write_shards(folder, {"caption": pa.nulls(0), "label_0": pa.array([], pa.string())}, columns_of())
    return folder, {}, FIRST


def all_shards_empty(folder):
    empty = {name: column[:0] for name, column in columns_of().items()}
    write_shards(folder, empty, empty)
    return folder, {}, r"has no rows: 2 files, the first is .*train-00000-of-00002\.parquet"


def int_and_double(folder):
    write_shards(folder, columns_of(label_0=numbers([1, 0, 1, 0])), columns_of(NUM_ROWS))
    return folder, {}, BOTH


def bool_and_decimal(folder):
    one, zero = decimal.Decimal("1.00"), decimal.Decimal("0.00")
    write_shards(
        folder,
        columns_of(label_0=numbers([True, False, True, False])),
        columns_of(NUM_ROWS, label_0=numbers([one, zero, one, zero], pa.decimal128(3, 2))),
    )
    return folder, {}, BOTH


def labels_null_throughout(folder):
    write_shards(folder, columns_of(), columns_of(NUM_ROWS, label_0=pa.nulls(NUM_ROWS)))
    return folder, {}, FIRST


def text_and_large_text(folder):
    large = columns_of(NUM_ROWS)["caption"].cast(pa.large_string())
    images = columns_of(NUM_ROWS)["jpg_0"].cast(pa.large_binary())
    write_shards(folder, columns_of(), columns_of(NUM_ROWS, caption=large, jpg_0=images))
    return folder, {}, BOTH


def number_and_text(folder):
    write_shards(folder, columns_of(), columns_of(NUM_ROWS, label_0=pa.array(["1"] * NUM_ROWS)))
    return folder, {}, r"/train-00001-of-00002\.parquet has column label_0 as string, and train-00000-of-.* as double"


def bytes_and_structs(folder):
    images = pa.array([{"bytes": file_of(picture(0)), "path": None}] * NUM_ROWS)
    write_shards(folder, columns_of(), columns_of(NUM_ROWS, jpg_0=images))
    return folder, {}, r"/train-00001-of-00002\.parquet has column jpg_0 as struct<.*, and train-00000-of-.* as binary"


def structs_of_other_fields(folder):
    def images(first, **fields):
        return pa.array([{"bytes": file_of(picture(2 * (first + row)))} | fields for row in range(NUM_ROWS)])

    write_shards(folder, columns_of(jpg_0=images(0)), columns_of(NUM_ROWS, jpg_0=images(NUM_ROWS, path="x", sha="y")))
    return folder, {}, BOTH


def damaged_footer(folder):
    write_shards(folder, columns_of(), columns_of(NUM_ROWS))
    torn = folder / "train-00001-of-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-30])
    return folder, {}, r"/train-00001-of-00002\.parquet cannot be read as parquet"


def damaged_footer_length(folder):
    write_shards(folder, columns_of(), columns_of(NUM_ROWS))
    (folder / "train-00000-of-00002.parquet").write_bytes(b"")
    return folder, {}, r"/train-00000-of-00002\.parquet cannot be read as parquet"


def categories(folder):
    texts, images = columns_of()["caption"].dictionary_encode(), columns_of()["jpg_0"].dictionary_encode()
    labels = columns_of()["label_0"].dictionary_encode()
    write_shards(folder, columns_of(caption=texts, jpg_0=images, label_0=labels), columns_of(NUM_ROWS))
    return folder, {}, BOTH


def unused_of_any_type(folder):
    others = {
        "m": pa.array([[("a", 1)]] * NUM_ROWS, pa.map_(pa.string(), pa.int64())),
        "d": pa.array([1] * NUM_ROWS, pa.duration("s")),
        "n": pa.nulls(NUM_ROWS),
        "jpg_0.bytes": pa.array(["x"] * NUM_ROWS),
    }
    write_shards(folder, columns_of(**others), columns_of(NUM_ROWS, m=numbers([1, 2, 3, 4])))
    return folder, {}, BOTH


def a_column_twice(folder):
    columns = columns_of()
    table = pa.Table.from_arrays([*columns.values(), columns["jpg_0"]], names=[*columns, "jpg_0"])
    folder.mkdir()
    pq.write_table(table, folder / "train.parquet")
    return folder, {}, r"/train\.parquet has column jpg_0 2 times"


def an_unused_column_twice(folder):
    columns = columns_of()
    table = pa.Table.from_arrays([*columns.values(), *[columns["label_0"]] * 2], names=[*columns, "other", "other"])
    folder.mkdir()
    pq.write_table(table, folder / "train.parquet")
    return folder, {}, FIRST


def an_empty_saved_folder(folder):
    Dataset.from_dict({name: [] for name in columns_of()}).save_to_disk(folder)
    (folder / "state.json").write_text((folder / "state.json").read_text().replace('"filename"', '"file"'))
    return folder, {}, "save_to_disk folder, cannot be read, or has no rows"


def a_saved_folder_without_files(folder):
    Dataset.from_dict({name: column.to_pylist() for name, column in columns_of().items()}).save_to_disk(folder)
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(re.sub(r'"_data_files": \[.*?\]', '"_data_files": []', state, flags=re.DOTALL))
    return folder, {}, "save_to_disk folder, cannot be read, or has no rows"


def ids_of_two_widths(folder):
    ids = {"image_0_uid": pa.array(list("abcd")), "image_1_uid": pa.array(list("efgh"))}
    write_shards(
        folder,
        columns_of(ranking_id=numbers([1, 2, 3, 4], pa.int32()), **ids),
        columns_of(NUM_ROWS, ranking_id=numbers([5, 6, 7, 8], pa.int64()), **ids),
    )
    return folder, {}, BOTH


def ids_that_became_floats(folder):
    ids = {"image_0_uid": pa.array(list("abcd")), "image_1_uid": pa.array(list("efgh"))}
    write_shards(
        folder,
        columns_of(ranking_id=numbers([1, 2, 3, 4]), **ids),
        columns_of(NUM_ROWS, ranking_id=numbers([5.0, 6.0, 7.0, 8.0]), **ids),
    )
    return folder, {}, r"/train-00001-of-00002\.parquet has column ranking_id as double, and .* as int64"


CASES = [
    label_missing,
    caption_missing_in_the_first,
    confidence_missing,
    unused_missing,
    empty_shard,
    empty_shard_of_other_types,
    all_shards_empty,
    int_and_double,
    bool_and_decimal,
    labels_null_throughout,
    text_and_large_text,
    number_and_text,
    bytes_and_structs,
    structs_of_other_fields,
    damaged_footer,
    damaged_footer_length,
    categories,
    unused_of_any_type,
    a_column_twice,
    an_unused_column_twice,
    an_empty_saved_folder,
    a_saved_folder_without_files,
    ids_of_two_widths,
    ids_that_became_floats,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_pairs_or_refusal_are_the_same_however_a_set_is_read(case, tmp_path):
    require_one_outcome(case, tmp_path)


@pytest.mark.parametrize("in_file_order", [True, False])
def test_text_that_is_not_utf8_makes_a_bad_row_and_leaves_the_others(in_file_order, tmp_path):
    broken = pa.array([b"prompt 0", b"\xff\xfe", b"prompt 2", b"prompt 3"]).cast(pa.binary())
    as_text = pa.StringArray.from_buffers(NUM_ROWS, broken.buffers()[1], broken.buffers()[2])
    path = write(tmp_path / "x.parquet", columns_of(caption=as_text, model_0=as_text, model_1=as_text))
    source = opened(tmp_path, path, in_file_order=in_file_order, max_pairs_per_prompt=1)
    assert source.read(0).prompt == "prompt 0"
    with pytest.raises(BadRowError, match=r"row 1 of .*caption: text that is not UTF-8: invalid start byte at byte 0"):
        source.read(1)
    assert source.read(2).prompt == "prompt 2"
    assert len(opened(tmp_path, path, in_file_order=in_file_order, models=["prompt"])) == 3


def test_rows_that_a_file_claims_and_does_not_have_are_an_error(tmp_path):
    path = write(tmp_path / "x.parquet", columns_of(), compression="none", use_dictionary=False, write_statistics=False)
    content = bytearray(path.read_bytes())
    source = opened(tmp_path, path, in_file_order=True)
    column = pq.read_metadata(path).row_group(0).column(1)
    content[column.data_page_offset : column.data_page_offset + 40] = bytes(40)
    path.write_bytes(content)
    for _ in range(2):  # the second time as the first
        with pytest.raises(DataError, match=r"x\.parquet: row group 0 "):
            source.read(0)
