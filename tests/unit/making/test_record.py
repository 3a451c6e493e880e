"""The record of a finished folder: what is refused, and what differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.record import (
    RecordPart,
    check_sizes,
    differences,
    read_record_file,
    refuse_if_stale,
    write_record_file,
    write_rows,
)
from ds_dpo.storage.manifest import FileEntry, hash_file, leads_outside


class Books(RecordPart):
    format: int = 3
    files: dict[str, FileEntry]


# SHA-256 of abc: FIPS 180-2, appendix B.1
OF_ABC = FileEntry(size=3, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def read(path: Path) -> Books:
    return read_record_file(path, Books, format_version=3, state_without="holds no books")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, record = tmp_path / "books.json", Books(files={"a": OF_ABC})
    write_record_file(path, record)
    assert read(path) == record
    assert json.loads(path.read_text()) == {"format": 3, "files": {"a": {"size": 3, "sha256": OF_ABC.sha256}}}
    assert [found.name for found in tmp_path.iterdir()] == ["books.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"has no books\.json, so it holds no books"),
        ("{", r"books\.json: not readable as JSON"),
        ("[]", r"format None, this version reads 3; make the cache again"),
        ('{"format": 2, "files": {}}', r"format 2, this version reads 3"),
        ('{"format": 3}', r"not the record of a cache \(files: Field required\)"),
        ('{"format": 3, "files": {"a": {"size": 3}}}', r"not the record of a cache \(files\.a\.sha256: Field required"),
        ('{"format": 3, "files": {}, "more": 1}', r"not the record of a cache \(more: Extra inputs"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "books.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=said):
        read(path)


def test_files_that_are_missing_or_cut_short_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    check_sizes(tmp_path, {"a": OF_ABC})
    with pytest.raises(DataError, match="b: missing, but the cache's record lists it"):
        check_sizes(tmp_path, {"a": OF_ABC, "b": OF_ABC})
    (tmp_path / "a").write_text("ab")
    with pytest.raises(DataError, match="a: 2 bytes, the cache's record says 3; it was cut short or altered"):
        check_sizes(tmp_path, {"a": OF_ABC})


def test_rows_are_written_as_numpy_reads_them_and_their_entry_is_that_of_the_file(tmp_path: Path) -> None:
    rows = np.array([(1, 0.5), (2, 0.25)], np.dtype([("index", "<i8"), ("error", "<f4")]))
    entry = write_rows(tmp_path / "rows.npy", rows)
    assert np.load(tmp_path / "rows.npy").tolist() == rows.tolist()
    assert entry == hash_file(tmp_path / "rows.npy")


def test_differences_name_what_changed_what_is_new_and_what_is_gone() -> None:
    found, wanted = {"seed": "0", "flip": "off", "gone": "x"}, {"seed": "1", "flip": "off", "new": "y"}
    assert differences(found, wanted, asker="this run") == [
        "seed: the cache has 0, this run 1",
        "new: the cache has (nothing), this run y",
        "gone: the cache has x, this run (nothing)",
    ]


def test_a_stale_cache_is_refused_with_all_differences_and_what_would_help() -> None:
    refuse_if_stale("data.cache", Path("there"), [], why="it is old", program="scripts/cache.py")
    with pytest.raises(ConfigError) as caught:
        refuse_if_stale("data.cache", Path("there"), ["a: 1", "b: 2"], why="it is old", program="scripts/cache.py")
    assert str(caught.value) == (
        "data.cache there is stale: it is old:\n  a: 1\n  b: 2\n"
        "make it again with scripts/cache.py and this configuration, in another folder, or restore the old settings"
    )


@pytest.mark.parametrize(
    ("name", "outside"),
    [("a", False), ("images/0.arrow", False), ("a..b", False), ("/etc/a", True), ("../a", True), ("a/../../b", True)],
)
def test_a_name_that_leads_out_of_its_folder_is_seen(name: str, outside: bool) -> None:
    assert leads_outside(name) is outside
