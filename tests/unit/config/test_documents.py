"""Unit tests of the reader of YAML and JSON documents."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_dpo.config.bounded_yaml import BoundedLoader
from ds_dpo.config.documents import parse_yaml, read_json, read_yaml
from ds_dpo.engine.settings_file import read_deepspeed_file
from ds_dpo.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document"


def test_documents_are_read_as_they_are(path: Path) -> None:
    path.write_text('{"name": "grüße", "values": [1, 2.5, null, true]}', encoding="utf-8")
    expected = {"name": "grüße", "values": [1, 2.5, None, True]}
    assert read_json(path, dict) == expected
    assert read_yaml(path, dict) == expected, "JSON is YAML"


def test_yaml_is_read_as_version_1_2(path: Path) -> None:
    """By the core schema of yaml.org/spec/1.2.2, section 10.3; version 1.1 reads 8, 90, a date and truth values."""
    words = "1e-8 1.0e-08 010 0o10 0x1F +5 -3. .5 1:30 2024-01-01 2024-13-45 1_000 off yes On n true TRUE ~ null none"
    path.write_text("".join(f"- {word}\n" for word in words.split()))
    assert read_yaml(path, list) == [
        *(1e-8, 1e-8, 10, 8, 31, 5, -3.0, 0.5),
        *("1:30", "2024-01-01", "2024-13-45", "1_000", "off", "yes", "On", "n"),
        *(True, True, None, None, "none"),
    ]


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
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "is nested too deeply"),
        (b'{"a": "x\\u0000y"}', "holds a text with the character NUL, which no name, path or prompt may have"),
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
        (b"\0\0", "is not valid YAML: unacceptable character #x0000"),
        (b"[" * 600 + b"]" * 600, "is nested too deeply"),
        (b"- 1\n", "must contain names and values, not a list"),
        (b"a: " + b"1" * 5000 + b"\n", "is not valid YAML: 1111"),
        (b"[" * 3000, "is nested too deeply"),
        (b"a: {" * 3000, "is nested too deeply"),
        (b'a: "x\\0y"\n', "holds a text with the character NUL"),
        (b"a: !!timestamp x\n", "is not valid YAML: a value does not fit its tag"),
        (b"a: !!float ''\n", "is not valid YAML: "),
        (b"a: !!binary x\n", "is not valid YAML: "),
        (b"? [1]\n: 2\n", "is not valid YAML: found unhashable key"),
        (b"a: &a [*a]\n", "is not valid YAML: an alias refers to what it is a part of"),
        (b"b: " + b"x" * 99_999 + b": 1\n", "is not valid YAML: mapping values are not allowed here"),
        (b"x" * 900 + b": 1\n" + b"x" * 900 + b": 2\n", "is not valid YAML: xxxxx"),
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


def bomb(levels: int, *, opening: str, item: str, closing: str) -> str:
    """Each level holds the one below nine times."""
    lines = [f"a0: &a0 {opening}{closing if opening == '[' else 'k: 1' + closing}"]
    for level in range(1, levels):
        parts = [item.format(name=f"*a{level - 1}", place=place) for place in range(9)]
        lines.append(f"a{level}: &a{level} {opening}{', '.join(parts)}{closing}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        bomb(9, opening="[", item="{name}", closing="]"),
        bomb(9, opening="{", item="k{place}: {name}", closing="}"),
        bomb(30, opening="[", item="{name}", closing="]"),
        "".join(
            ["a0: &a0 {k: 1}\n", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))]
        ),
    ],
    ids=["lists", "mappings", "deep", "merges"],
)
def test_aliases_that_would_expand_are_refused_before_they_do(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds more than 20000 values, with its aliases written out") as refused:
        read_yaml(path, dict)
    assert len(str(refused.value)) < 400


def test_usual_aliases_are_values(path: Path) -> None:
    path.write_text("a: &a {x: 1}\nb: [*a, *a]\nc: {d: *a}\n")
    assert read_yaml(path, dict) == {"a": {"x": 1}, "b": [{"x": 1}] * 2, "c": {"d": {"x": 1}}}


def test_files_are_regular_and_of_a_stated_size(path: Path) -> None:
    os.mkfifo(path)
    for read in (read_json, read_yaml):
        with pytest.raises(ConfigError, match="cannot be read: is a named pipe, not a regular file"):
            read(path, dict)
    path.unlink()
    path.write_bytes(b"#" * (2**19 + 1))
    with pytest.raises(ConfigError, match=r"cannot be read: is larger than 0\.5 MiB"):
        read_yaml(path, dict)
    path.write_bytes(b" " * (4 * 2**20 + 1))
    with pytest.raises(ConfigError, match=r"cannot be read: is larger than 4 MiB"):
        read_json(path, dict)
    with pytest.raises(ConfigError, match=r"cannot be read: is larger than 0\.25 MiB"):
        read_deepspeed_file(path)
    with pytest.raises(ValueError, match="longer than 524288 characters"):
        parse_yaml("#" * (2**19 + 1))


@pytest.mark.parametrize("text", ["- 1\n" * 21_000, "[" + "1," * 21_000 + "1]", "- !!str a\n" * 21_000])
def test_values_are_counted_before_their_list_is_complete(text: str) -> None:
    composed = []

    class Counting(BoundedLoader):
        def compose_scalar_node(self, anchor: Any) -> Any:
            composed.append(anchor)
            return super().compose_scalar_node(anchor)

    with pytest.raises(yaml.YAMLError, match="holds more than 20000 values"):
        yaml.load(text, Loader=Counting)
    assert len(composed) == 20_000 - 1  # the list is a value too
