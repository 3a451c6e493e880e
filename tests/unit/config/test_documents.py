"""Unit tests of the reader of YAML and JSON documents."""

from pathlib import Path

import pytest

from ds_dpo.config.documents import read_json, read_yaml
from ds_dpo.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document"


def test_documents_are_read_as_they_are(path: Path) -> None:
    path.write_text('{"name": "grüße", "values": [1, 2.5, null, true]}', encoding="utf-8")
    expected = {"name": "grüße", "values": [1, 2.5, None, True]}
    assert read_json(path, dict) == expected
    assert read_yaml(path, dict) == expected, "JSON is YAML"
    path.write_text("- 1e-8\n- off\n- yes\n- true\n- 1.0e-08\n")
    assert read_yaml(path, list) == [1e-8, "off", "yes", True, 1e-8]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b'{"a": 1', "is not valid JSON: Expecting ',' delimiter: line 1 column 8 (char 7)"),
        (b'{"a": 1}\xe9', "is not UTF-8 text: byte 8 is 0xe9"),
        (b"[" * 90_000, "is nested too deeply"),
        (b"[1]", "must contain names and values, not a list"),
        (b"null", "must contain names and values, not None"),
    ],
)
def test_what_is_wrong_with_json_is_one_line(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_json(path, dict, advice="write it anew")
    assert str(refused.value) == f"{path} {said}; write it anew"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: {b\n", "is not valid YAML: expected ',' or '}', but got '<stream end>', line 2 column 1"),
        (b"a: 1\na: 2\n", "is not valid YAML: a is given twice, line 1 column 1"),
        (b"a: !!python/object:os.system {}\n", "is not valid YAML: could not determine a constructor for the tag"),
        (b"a: 2001-99-99\n", "is not valid YAML: month must be in 1..12"),
        (b"\0\0", "is not valid YAML: unacceptable character #x0000"),
        (b"[" * 600 + b"]" * 600, "is nested too deeply"),
        (b"- 1\n", "must contain names and values, not a list"),
        (b"text\n", "must contain names and values, not 'text'"),
    ],
)
def test_what_is_wrong_with_yaml_is_one_line(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_yaml(path, dict)
    assert str(refused.value).startswith(f"{path} {said}")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"document cannot be read: No such file or directory$"):
        read_yaml(path, dict)
