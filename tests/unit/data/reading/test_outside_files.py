"""Files that never end, or hold too much, are not read."""

import os
from pathlib import Path

import pytest
from pair_files import config

from ds_dpo.data.reading.folder_files import patterns_of_subset
from ds_dpo.data.reading.image_files import read_file
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import DataError


def test_an_image_that_never_ends_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path, said in ((tmp_path / "a.png", "a named pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "directory")):
        with pytest.raises(DataError, match=said):
            read_file(path)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.tar", "train.csv"])
def test_a_pipe_with_the_name_of_a_split_is_refused_at_once(tmp_path, name):
    folder = tmp_path / "pairs"
    folder.mkdir()
    os.mkfifo(folder / name)
    for dataset in (folder, folder / name):
        with pytest.raises(DataError):
            open_source(config(dataset, cache_dir=str(tmp_path / "cache")), say=print)


def test_front_matter_that_would_expand_or_nest_without_an_end_has_no_patterns(tmp_path):
    bomb = "".join(["a0: &a0 [x]\n", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))])
    for header in (bomb, "[" * 3000, "configs: 2024-13-45", "\0", "x: !!float ''"):
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
        assert patterns_of_subset(tmp_path, "a") is None
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: a/*.parquet\n---\n")
    assert patterns_of_subset(tmp_path, "a") == {"train": ["a/*.parquet"]}
