"""Unit tests of files that take the place of others."""

import os
import stat

import pytest

from ds_dpo.storage.replace import partial_path, remove_partials, replace_file, replacing


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the disk, in order: the name that is synced or renamed."""
    found = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        found.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(source, target):
        found.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return found


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "note.json"
    for content in ("old", "grüße", b"\x00\xff"):
        replace_file(path, content, sync=False)
    assert path.read_bytes() == b"\x00\xff"
    replace_file(path, "grüße", sync=True)
    assert path.read_text(encoding="utf-8") == "grüße"
    assert [found.name for found in tmp_path.iterdir()] == ["note.json"]


def test_what_is_synced_is_synced_before_the_rename_and_its_folder_after(tmp_path, calls):
    path = tmp_path / "note.json"
    replace_file(path, "new", sync=True)
    assert calls == [("sync", partial_path(path).name), ("rename", "note.json"), ("sync", tmp_path.name)]


def test_what_is_not_to_be_synced_is_only_renamed(tmp_path, calls):
    replace_file(tmp_path / "note.json", "new", sync=False)
    assert calls == [("rename", "note.json")]


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "note.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path, sync=True) as temporary:
        temporary.write_text("half, then \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["note.json"]


def test_errors_of_the_disk_reach_the_caller(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "nowhere" / "note.json", "new", sync=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "folder", "new", sync=True)
    assert [found.name for found in tmp_path.iterdir()] == ["folder"]


def test_the_mode_is_that_of_the_new_file_whatever_a_killed_process_left(tmp_path):
    path = tmp_path / "launch.env"
    partial_path(path).write_text("of a killed process of the same number, for all to read")
    mask = os.umask(0)
    try:
        replace_file(path, "A=1\n", sync=False, mode=0o600)
        replace_file(tmp_path / "usual", "", sync=False)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "usual").stat().st_mode) == 0o666


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    left = [partial_path(folder / "note.json") for folder in (tmp_path, inner)]
    kept = [tmp_path / "note.json", tmp_path / "note.partial", inner / ".hidden"]
    for path in [*left, *kept]:
        path.touch()
    remove_partials(tmp_path)
    assert not left[0].exists()
    assert left[1].exists()
    remove_partials(tmp_path, recursive=True)
    assert not left[1].exists()
    assert all(path.exists() for path in kept)
