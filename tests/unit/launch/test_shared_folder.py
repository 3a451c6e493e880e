"""A token in the run folder: there for as long as it is read, and nothing of it afterwards."""

import pytest

from ds_dpo.errors import ConfigError
from ds_dpo.launch.shared_folder import read_token, token_in


def test_a_token_is_read_while_it_is_there_and_takes_its_folders_with_it(tmp_path):
    with token_in(tmp_path / "runs" / "new") as token:
        assert token.path.parent == tmp_path / "runs" / "new"
        assert read_token(str(token.path)) == token.text
        with token_in(tmp_path / "runs" / "new") as other:
            assert other.text != token.text
    assert read_token(str(token.path)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_something_else_lies_by_then_stays(tmp_path):
    with token_in(tmp_path / "run"):
        (tmp_path / "run" / "STOP").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["STOP"]


def test_a_folder_that_cannot_be_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(ConfigError, match=r"file/run cannot be written \(Not a directory\)"),
        token_in(tmp_path / "file" / "run"),
    ):
        pass
    name = "x" * 300
    with pytest.raises(ConfigError, match="File name too long"), token_in(tmp_path / "made" / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
