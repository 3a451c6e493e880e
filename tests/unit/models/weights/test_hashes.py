"""A file is hashed once, and again when it may have changed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.errors import ModelError
from ds_dpo.models.weights.hashes import remembered_sha256


def test_a_file_is_hashed_again_only_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    # SHA-256 of abc: FIPS 180-2, appendix B.1
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert remembered_sha256(file) == of_abc
    (note,) = (tmp_path / "home/ds_dpo/sha256").iterdir()
    note.write_text("0" * 64)
    assert remembered_sha256(file) == "0" * 64
    os.utime(file, ns=(1, 1))
    assert remembered_sha256(file) == of_abc
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # cannot be written
    assert remembered_sha256(file) == of_abc


def test_a_file_of_the_same_size_and_date_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file, other = tmp_path / "weights", tmp_path / "other"
    file.write_bytes(b"abc")
    of_abc, date = remembered_sha256(file), file.stat().st_mtime_ns
    other.write_bytes(b"abd")
    os.utime(other, ns=(date, date))
    other.replace(file)
    assert file.stat().st_mtime_ns == date
    assert remembered_sha256(file) != of_abc


@pytest.mark.parametrize("home", ["unreadable", "a file", "absent", None])
def test_no_home_folder_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "a file").write_text("")
    if home is None:  # a user id without an entry, as in containers
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    if home == "unreadable":
        for name in ("open", "stat"):
            monkeypatch.setattr(os, name, refuse_below(tmp_path / home, getattr(os, name)))
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    # SHA-256 of abc: FIPS 180-2, appendix B.1
    assert remembered_sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def refuse_below(folder: Path, call: Callable[..., Any]) -> Callable[..., Any]:
    def refusing(path: Any, *rest: Any, **named: Any) -> Any:
        if str(path).startswith(str(folder)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return call(path, *rest, **named)

    return refusing


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights: cannot be read \(No such file"):
        remembered_sha256(tmp_path / "weights")
