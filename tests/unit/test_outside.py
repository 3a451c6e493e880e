"""Only regular files are opened, and at once; values in messages are short."""

import os
import socket
from pathlib import Path

import pytest

from ds_dpo.errors import cut, shown
from ds_dpo.outside import check_regular, open_regular, parse_json, read_regular


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    plain, pipe, link = tmp_path / "plain", tmp_path / "train.parquet", tmp_path / "link"
    plain.write_bytes(b"abc")
    link.symlink_to(plain)
    os.mkfifo(pipe)
    for path in (plain, link):
        check_regular(path)
        with open_regular(path) as file:
            assert file.read() == b"abc"
    with socket.socket(socket.AF_UNIX) as end:
        monkeypatch.chdir(tmp_path)  # a socket's path has at most 108 characters
        end.bind("socket")
        for path, said in ((pipe, "a named pipe, not a regular file"), (Path("/dev/zero"), "a device")):
            for read in (open_regular, check_regular, lambda path: read_regular(path, max_bytes=9)):
                with pytest.raises(OSError, match=said):
                    read(path)
        with pytest.raises(OSError, match="a socket"):
            check_regular(tmp_path / "socket")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    assert read_regular(plain, max_bytes=3) == b"abc"
    with pytest.raises(OSError, match="is larger than"):
        read_regular(plain, max_bytes=2)


def test_json_fails_in_one_way():
    assert parse_json('{"a": [1, NaN]}')["a"][0] == 1
    for text in ("{", "[" * 3000, '{"a":' * 3000, "1" * 5000, b"\xff\xfe{", ""):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)


def test_values_in_messages_are_short():
    assert shown("abc") == "'abc'"
    assert shown(1.5) == "1.5"
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"
    nested = ["lol"]
    for _ in range(60):
        nested = [nested] * 9  # written out it has more elements than there are atoms
    for value in ("x" * 10**6, list(range(10**6)), nested, {"a": {"b": {"c": {"d": "e" * 999}}}}, b"y" * 9999):
        assert len(shown(value)) <= 210
    assert shown(10**5000) == "a number of more than 4300 digits" or len(shown(10**5000)) <= 210
    assert "\n" not in shown("a\nb" * 999)
    assert cut("abcdefgh" * 10, characters=8) == "abcd ... gh"
    assert cut("a\n  b\r\nc") == "a b c"
