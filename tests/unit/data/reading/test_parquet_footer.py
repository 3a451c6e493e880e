"""Sizes of columns are those that pyarrow reads, and a damaged footer is an error where pyarrow ends the process."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import config, file_of, picture

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.reading.parquet_footer import column_bytes
from ds_dpo.errors import DataError

ROWS = [
    {
        "prompt": f"p{number}",
        "images": [{"bytes": file_of(picture(2 * number + place)), "path": "x"} for place in (0, 1)],
        "rank": [1, 2],
        "a.dot": {"in.ner": float(number)},
    }
    for number in range(20)
]


def sizes_of_pyarrow(path):
    sizes, metadata = Counter(), pq.read_metadata(path)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for leaf in map(group.column, range(group.num_columns)):
            for column in {leaf.path_in_schema, leaf.path_in_schema.split(".")[0]}:
                sizes[column] += leaf.total_uncompressed_size
    return dict(sizes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 3, "compression": "zstd", "write_page_index": True},
        {"data_page_version": "2.0", "use_dictionary": False, "sorting_columns": [pq.SortingColumn(0)]},
        {"store_schema": False, "write_statistics": False, "write_page_checksum": True},
    ],
)
def test_sizes_are_those_of_pyarrow(options, tmp_path):
    table = pa.Table.from_pylist(ROWS).append_column("t", pa.array(range(20), pa.decimal128(7, 2)))
    pq.write_table(table, tmp_path / "x.parquet", **options)
    found = column_bytes(tmp_path / "x.parquet")
    assert found == sizes_of_pyarrow(tmp_path / "x.parquet")
    assert found["images"] > 40 * 900  # 20 x 16 pixels of noise


@pytest.mark.parametrize("in_file_order", [True, False])
def test_a_footer_whose_statistics_do_not_fit_its_schema_is_an_error(in_file_order, tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    content = path.read_bytes()
    optional, required = b"\x02\x18\x04rank", b"\x00\x18\x04rank"
    assert content.count(optional) == 1
    path.write_bytes(content.replace(optional, required))
    data = config(path, format="ranked", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"train\.parquet.* cannot be read: .*histogram size mismatch"):
        open_source(data, say=lambda line: None, in_file_order=in_file_order)


def test_a_footer_that_is_cut_or_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")

    def with_footer(footer):
        return content[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"

    deep, many = b"\x1c" * 100, b"\x49\xfc\xff\xff\xff\xff\x0f"
    cases = [
        (b"", "not that of a parquet file"),
        (content[:-4], "not that of a parquet file"),
        (with_footer(content[-8 - length : -20]), "cut short"),
        (with_footer(deep), "nested too deeply"),
        (with_footer(many), "cut short"),
        (with_footer(b"\x49\x15\x02\x00"), "other values where structs would fit"),
        (with_footer(b"\x1f"), "unknown type 15"),
        (with_footer(b"\x16" + b"\xff" * 11), "too many bytes"),
    ]
    for changed, said in cases:
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=said):
            column_bytes(path)
