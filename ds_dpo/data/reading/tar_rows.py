"""Samples of webdataset tars as rows: texts are read once, while images stay in the tar, found by offset and size.

A sample is a run of members with the same name up to the first dot; the rest of the name says what a member is. Only
headers and small texts are read, and nothing is unpacked.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ds_dpo.config.data import DataConfig
from ds_dpo.data.reading.arrow_values import Unreadable
from ds_dpo.data.reading.image_files import MemberBytes
from ds_dpo.data.reading.problems import PROBLEMS, text_or_problem, without_problems
from ds_dpo.data.reading.rows import ArrowRows, RowReader
from ds_dpo.data.reading.stored_table import ROWS_OF_A_BATCH, Hasher, MakeBatches
from ds_dpo.data.reading.text_rows import number_of_json, number_of_text
from ds_dpo.data.selection.formats import FORMATS, KIND_OF_ROLE, asked_columns, choose_columns
from ds_dpo.errors import DataError, cut
from ds_dpo.process.say import Say

SAMPLE_MEMBER = re.compile(r"(?P<key>(?:.*/|)[^./]+)[.](?P<ending>[^/]+)")
MAX_TEXT_BYTES = 2**20
BLOCK_BYTES = 512
# files that programs and people put beside the samples; one of these names with a text alone is not a sample
NAMES_OF_PROGRAMS = frozenset({"readme", "license", "licence", "changelog", "notes", "thumbs", "desktop"})
FOLDERS_OF_PROGRAMS = frozenset({"__macosx", "@eadir"})
BYTES_CHECKED_AT_ONCE = 2**20

MEMBER = pa.struct([("tar", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
TYPES: Mapping[str, pa.DataType] = {"image": MEMBER, "text": pa.string(), "number": pa.float64()}
ID_COLUMN = "id"


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A sample. members: by ending, each with the tar's number, offset and size."""

    tar: Path
    key: str
    members: Mapping[str, tuple[int, int, int]]


def tar_batches(files: Sequence[Path], data: DataConfig, name: str, *, say: Say) -> MakeBatches:
    """Return the function that makes a row for each sample; columns have the names of roles, as members may differ.

    It raises DataError for a file that is not a tar, is compressed or is cut short; for a repeated member; for a sample
    whose members are not next to each other; for a text that should be a number and is not; and for members that no
    sample has. A member that a sample lacks is null.
    """

    def make(hasher: Hasher) -> Iterator[pa.RecordBatch]:
        say(f"{name}: reading the headers of {len(files)} tars, once")
        endings = _endings_of_roles(data)
        types = [(ID_COLUMN, pa.string()), *((role, TYPES[KIND_OF_ROLE[role]]) for role in endings)]
        schema = pa.schema([*types, (PROBLEMS, pa.string())])
        seen: set[str] = set()
        found: set[str] = set()
        rows: list[dict[str, Any]] = []
        for number, path in enumerate(files):
            hasher.update(f"{path.name}\n".encode())
            for row in _rows(path, number, endings, seen):
                found |= {role for role, value in row.items() if value is not None}
                values, problems = without_problems(row)
                hasher.update(json.dumps(values, sort_keys=True).encode())
                rows.append({**values, PROBLEMS: problems})
                if len(rows) == ROWS_OF_A_BATCH:
                    yield pa.RecordBatch.from_pylist(rows, schema=schema)
                    rows = []
        for role, ending in asked_columns(data).items():
            if role not in found:
                raise DataError(f"{name}: data.columns has {role}={ending}; endings of members are {_listed(seen)}")
        choose_columns({role: role for role in endings if role in found}, sorted(seen), data, name)
        yield pa.RecordBatch.from_pylist(rows, schema=schema)

    return make


def _listed(endings: set[str]) -> str:
    return ", ".join(sorted(endings)) or "none"


def roles_found(rows: ArrowRows, data: DataConfig) -> dict[str, str]:
    """Return the columns, named like their roles, for which at least one sample has a value."""
    return {role: role for role in (ID_COLUMN, *FORMATS[data.format].roles) if rows.has_values(role)}


def member_reader(read_row: RowReader, files: Sequence[Path]) -> RowReader:
    """Return a reader whose images are MemberBytes, instead of the members' places."""

    def read(row: int) -> Mapping[str, Any]:
        return {
            column: MemberBytes(path=files[value["tar"]], offset=value["offset"], size=value["size"])
            if isinstance(value, Mapping)
            else value
            for column, value in read_row(row).items()
        }

    return read


def _endings_of_roles(data: DataConfig) -> dict[str, tuple[str, ...]]:
    asked = asked_columns(data)
    roles = FORMATS[data.format].roles
    return {role: (asked[role],) if role in asked else endings for role, endings in roles.items()}


def _samples(path: Path, number: int) -> Iterator[_Sample]:
    """Yield the samples of a tar in order."""
    key: str | None = None
    members: dict[str, tuple[int, int, int]] = {}
    keys: set[str] = set()
    for name, offset, size in _members(path):
        match = SAMPLE_MEMBER.fullmatch(name)
        if match is None:
            continue
        if match["key"] != key:
            if key is not None:
                yield _Sample(tar=path, key=key, members=members)
            key, members = match["key"], {}
            if key in keys:
                raise DataError(
                    f"{path}: members of sample {cut(key)} are not next to each other; pack it sorted by name"
                )
            keys.add(key)
        ending = match["ending"].lower()
        if ending in members:
            raise DataError(f"{path} has member {cut(name)} twice; pack it again")
        members[ending] = (number, offset, size)
    if key is not None:
        yield _Sample(tar=path, key=key, members=members)


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each regular member, from headers alone."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise all headers stay in memory
                if not member.isreg():
                    continue
                if member.sparse is not None:
                    raise DataError(f"{path}: member {cut(member.name)} is sparse; pack it again")
                yield member.name, member.offset_data, member.size
            _require_end(path, tar.offset)
    # tarfile raises ValueError, EOFError, OverflowError and others for numbers and headers that make no sense
    except (OSError, tarfile.TarError, ValueError, EOFError, ArithmeticError, LookupError, TypeError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar: {error}") from error


def _require_end(path: Path, offset: int) -> None:
    """Raise DataError if there is no end mark at the offset: tarfile takes a missing or torn header for the end.

    Behind the end, tar pads with zeros; anything else is another archive, which would be ignored silently.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise DataError(f"{path} is cut short or torn at byte {offset}; copy or download it again")
        while block := file.read(BYTES_CHECKED_AT_ONCE):
            if block.count(0) != len(block):
                raise DataError(f"{path} has another archive after its end at byte {offset}; split them into two files")


def _rows(path: Path, number: int, endings: Mapping[str, Sequence[str]], seen: set[str]) -> Iterator[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            for sample in _samples(path, number):
                row = _row(sample, endings, file, seen)
                if not _is_of_program(sample, row):
                    yield row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _is_of_program(sample: _Sample, row: Mapping[str, Any]) -> bool:
    """Whether a sample is none: a file such as README.md, Thumbs.db, or what macOS adds, with no image of a role."""
    if any(value is not None for role, value in row.items() if role != ID_COLUMN and KIND_OF_ROLE[role] == "image"):
        return False
    *folders, name = sample.key.lower().split("/")
    is_named = name in NAMES_OF_PROGRAMS or bool(FOLDERS_OF_PROGRAMS & set(folders))
    return is_named or all(value is None for role, value in row.items() if role != ID_COLUMN)


def _row(sample: _Sample, endings: Mapping[str, Sequence[str]], file: Any, seen: set[str]) -> dict[str, Any]:
    """Return a sample's values by role, and add its endings to `seen`."""
    values = _json_values(sample, file) if "json" in sample.members else {}
    seen |= sample.members.keys() | values.keys()
    row: dict[str, Any] = {ID_COLUMN: f"{sample.key} in {sample.tar.name}"}
    for role, tried in endings.items():
        ending = next((each for each in tried if each in sample.members or each in values), None)
        place = f"{sample.tar}, {cut(sample.key)}.{ending}"
        row[role] = None if ending is None else _value(role, ending, sample, values, file, place)
    return row


def _value(role: str, ending: str, sample: _Sample, values: Mapping[str, Any], file: Any, place: str) -> Any:
    kind = KIND_OF_ROLE[role]
    if kind == "image":
        if ending not in sample.members:
            raise DataError(f"{place} is not a member; role {role} needs one, such as {role}.jpg")
        return dict(zip(("tar", "offset", "size"), sample.members[ending], strict=True))
    value = values[ending] if ending in values else _text(sample, ending, file)
    if kind == "text":
        return text_or_problem(value) if not isinstance(value, Unreadable) else value
    if value is None:
        return None
    if isinstance(value, Unreadable):
        raise DataError(f"{place} is {value.reason}; a number would fit")
    return number_of_text(value, place) if isinstance(value, str) else number_of_json(value, place)


def _text(sample: _Sample, ending: str, file: Any) -> str | Unreadable:
    """Return a small text member, without the byte order mark and the line end that editors add."""
    _, offset, size = sample.members[ending]
    if size > MAX_TEXT_BYTES:
        return Unreadable(reason=f"a text of {size} bytes, more than {MAX_TEXT_BYTES}")
    file.seek(offset)
    try:
        return str(file.read(size).decode("utf-8-sig")).rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Unreadable(reason=f"text that is not UTF-8: {error.reason} at byte {error.start}")


def _json_values(sample: _Sample, file: Any) -> dict[str, Any]:
    """Return the values of a sample's json member as json:NAME."""
    text = _text(sample, "json", file)
    if isinstance(text, Unreadable):
        raise DataError(f"{sample.tar}, {cut(sample.key)}.json is {text.reason}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{sample.tar}, {cut(sample.key)}.json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{sample.tar}, {cut(sample.key)}.json is {type(values).__name__}; an object would fit")
    return {f"json:{key}": value for key, value in values.items()}
