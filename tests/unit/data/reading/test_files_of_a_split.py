"""Which files a split has, by names, patterns and links: whichever program reads them, it has one outcome."""

import os

import pytest
from both_ways import BOTH, FIRST, require_one_outcome
from shard_writers import NUM_ROWS, columns_of, write, write_shards

from ds_dpo.config.load import load_config
from ds_dpo.errors import ConfigError


def hub_names_with_digits(folder):
    for number, digits in enumerate(("b66ac786bf6fb553", "0123456789012345")):
        write(folder / "data" / f"train-0000{number}-of-00002-{digits}.parquet", columns_of(NUM_ROWS * number))
    write(folder / "data" / "train_unique-00000-of-00001-33ead111845fc9c4.parquet", columns_of(99))
    return folder, {}, BOTH


def hub_names_of_two_uploads(folder):
    for number, digits in ((0, "b66ac786bf6fb553"), (1, "c7b349dd222d6515"), (1, "d001aa00bb11cc22")):
        write(folder / "data" / f"train-0000{number}-of-00002-{digits}.parquet", columns_of())
    return folder, {}, r"train-00001-of-00002-c7.*parquet and train-00001-of-00002-d0.*parquet are both number 1 of 2"


def two_whole_uploads(folder):
    for name in ("00000-of-00001", "00000-of-00002", "00001-of-00002"):
        write(folder / "data" / f"train-{name}.parquet", columns_of())
    return folder, {}, r"train-00000-of-00001.parquet and train-00000-of-00002.parquet are of two uploads, so pairs may"


def one_file_beside_numbered_ones(folder):
    for name in ("train", "train-00000-of-00001"):
        write(folder / "data" / f"{name}.parquet", columns_of())
    return folder, {}, r"train-00000-of-00001.parquet and train.parquet are of two uploads, so pairs may be there twice"


def two_uploads_of_which_patterns_name_one(folder):
    for name in ("train", "train-00000-of-00001"):
        write(folder / "data" / f"{name}.parquet", columns_of())
    return folder, {"files": ["data/train.parquet"]}, FIRST


def split_with_a_dash(folder):
    write(folder / "train-v2-00000-of-00001.parquet", columns_of())
    return folder, {"split": "train-v2"}, FIRST


def two_splits_of_one_file(folder):
    return write(folder / "x.parquet", columns_of()), {"split": "train+test"}, "splits are not joined"


def spark_names(folder):
    for number in (0, 1):
        name = f"part-0000{number}-9f8a1c00-1111-2222-3333-444455556666-c000.snappy.parquet"
        write(folder / "train" / name, columns_of(NUM_ROWS * number))
    (folder / "train" / "_SUCCESS").touch()
    return folder, {}, BOTH


def dask_names(folder):
    for number in (0, 1):
        write(folder / f"part.{number}.parquet", columns_of(NUM_ROWS * number))
    return folder, {}, BOTH


def parts_by_their_old_split(folder):
    write(folder / "part-0.parquet", columns_of())
    return folder, {"split": "part"}, FIRST


def named_by_patterns(folder):
    for number, name in enumerate(("2024/a.parquet", "2025/deep/er/b.parquet", "c.parquet")):
        write(folder / name, columns_of(NUM_ROWS * number))
    return folder, {"files": ["2024/*.parquet", "2025/**/*.parquet"]}, BOTH


def named_by_a_pattern_of_nothing(folder):
    write(folder / "sub" / "part-0.parquet", columns_of())
    return (
        folder,
        {"files": ["part-*.parquet"]},
        r"data\.files has part-\*\.parquet, which matches no file .*/part-0",
    )


def named_by_a_pattern_that_leads_out(folder):
    write(folder / "part-0.parquet", columns_of())
    return folder, {"files": ["../*.parquet"]}, r"data\.files has '\.\./\*\.parquet'; a pattern below data\.dataset"


def named_by_a_pattern_of_other_files(folder):
    write(folder / "part-0.parquet", columns_of())
    (folder / "part-0.crc").touch()
    return folder, {"files": ["part-*"]}, r"data\.files matches part-0\.crc, and data\.format pickapic reads \.parquet"


def patterns_of_one_file(folder):
    return write(folder / "a.parquet", columns_of()), {"files": ["*.parquet"]}, "names files of a folder or of a hub"


def linked_folder(folder):
    write_shards(folder / "elsewhere", columns_of(), columns_of(NUM_ROWS))
    (folder / "set").mkdir()
    (folder / "set" / "data").symlink_to(folder / "elsewhere")
    (folder / "set" / "loop").symlink_to(folder / "set")
    return folder / "set", {}, BOTH


def linked_beside_itself(folder):
    write_shards(folder / "v1", columns_of())
    (folder / "latest").symlink_to(folder / "v1")
    return folder, {}, FIRST


def a_pipe(folder):
    folder.mkdir()
    os.mkfifo(folder / "train.parquet")
    return folder, {}, r"has no split train; it has no \.parquet file"


CASES = [
    hub_names_with_digits,
    hub_names_of_two_uploads,
    two_whole_uploads,
    one_file_beside_numbered_ones,
    two_uploads_of_which_patterns_name_one,
    split_with_a_dash,
    two_splits_of_one_file,
    spark_names,
    dask_names,
    parts_by_their_old_split,
    named_by_patterns,
    named_by_a_pattern_of_nothing,
    named_by_a_pattern_that_leads_out,
    named_by_a_pattern_of_other_files,
    patterns_of_one_file,
    linked_folder,
    linked_beside_itself,
    a_pipe,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_pairs_or_refusal_are_the_same_however_a_set_is_read(case, tmp_path):
    require_one_outcome(case, tmp_path)


def test_a_slice_is_refused_before_anything_is_opened(tmp_path):
    path = write(tmp_path / "x.parquet", columns_of())
    a_slice, nothing = r"data\.max_rows N to read only its first N rows", r"data\.split is empty; give a value"
    for split, message in (("train[:10%]", a_slice), ("train[5:]", a_slice), ("", nothing)):
        with pytest.raises(ConfigError, match=message):
            load_config(["--config", "miniature", "--data.dataset", str(path), "--data.split", split])
