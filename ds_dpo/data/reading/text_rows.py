"""Manifests and rankings as text: JSON lines, a JSON list, or CSV, converted to typed rows of the columns in use.

Each value gets the type of its role. A library that guesses types from the first rows would fail on later ones, and
would turn a prompt of digits into a number.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ds_dpo.config.data import DataConfig
from ds_dpo.data.reading.arrow_values import Unreadable
from ds_dpo.data.reading.problems import BYTE_OF_NO_TEXT, PROBLEMS, text_or_problem, without_problems
from ds_dpo.data.reading.stored_table import ROWS_OF_A_BATCH, Hasher, MakeBatches
from ds_dpo.data.selection.formats import KIND_OF_ROLE, Columns, find_columns
from ds_dpo.errors import DataError, cut
from ds_dpo.outside import open_regular

TYPES: Mapping[str, pa.DataType] = {
    "text": pa.string(),
    "image": pa.string(),
    "name": pa.string(),
    "number": pa.float64(),
}
WORDS_OF_NUMBERS = {"true": 1.0, "false": 0.0}

# a row of a text file: its place, for messages, and its values
Entry = tuple[str, Mapping[str, Any]]


def text_batches(files: Sequence[Path], data: DataConfig, name: str) -> MakeBatches:
    """Return the function that makes the rows of text files, with the columns that data's format and columns name.

    It raises DataError for a file that is not JSON or CSV, an entry that is not an object, a missing column, and a
    value that does not fit its role; each error names its file and line.
    """

    def make(hasher: Hasher) -> Iterator[pa.RecordBatch]:
        for path in files:
            hasher.update(f"{path.name} {_hash(path)}\n".encode())
        is_list = _scan_columns(files)
        if not is_list:
            raise DataError(f"{name}: {', '.join(map(str, files))} has no rows")
        columns = find_columns(list(is_list), data, name)
        has_lists = is_list.get(columns.of_role.get("images", ""), False)
        parsers = _parsers(columns, has_lists=has_lists, is_csv=files[0].suffix == ".csv")
        schema = pa.schema([*((column, type_) for column, (type_, _) in parsers.items()), (PROBLEMS, pa.string())])
        entries = chain.from_iterable(map(_entries, files))
        while batch := list(islice(entries, ROWS_OF_A_BATCH)):
            yield _batch(batch, parsers, schema)

    return make


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(path: Path) -> Iterator[Entry]:
    """Yield the rows of one file. A byte that is no UTF-8 becomes a character that makes its value unreadable."""
    try:
        with open_regular(path) as binary, TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="") as file:
            if path.suffix == ".csv":
                yield from _csv_entries(path, file)
            elif _starts_with_list(file):
                yield from _list_entries(path, file)
            else:
                yield from _line_entries(path, file)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _starts_with_list(file: Any) -> bool:
    start = file.read(4096).lstrip()
    file.seek(0)
    return bool(start.startswith("["))


def _list_entries(path: Path, file: Any) -> Iterator[Entry]:
    try:
        entries = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON list: {cut(str(error))}") from error
    for number, entry in enumerate(entries):
        yield _object(entry, f"{path}, entry {number}")


def _line_entries(path: Path, file: Any) -> Iterator[Entry]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not {_kind_of(line, 'JSON')}: {error}") from error
        yield _object(entry, f"{path}, line {number}")


def _kind_of(text: str, otherwise: str) -> str:
    """Return what a text that cannot be parsed should have been."""
    return "UTF-8 text" if BYTE_OF_NO_TEXT.search(text) else otherwise


def _object(entry: Any, place: str) -> Entry:
    if not isinstance(entry, dict):
        raise DataError(f"{place} is {type(entry).__name__}; an object of columns would fit")
    return place, entry


def _csv_entries(path: Path, file: Any) -> Iterator[Entry]:
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if BYTE_OF_NO_TEXT.search("".join(header)):
            raise DataError(f"{path}, line 1 is not UTF-8 text, so its columns have no names")
        if len(set(header)) != len(header):
            raise DataError(f"{path} has a column twice: {cut(', '.join(header))}")
        for values in reader:
            if not values:
                continue
            place = f"{path}, line {reader.line_num}"
            if len(values) != len(header):
                raise DataError(f"{place} has {len(values)} values, but the header has {len(header)} columns")
            yield place, dict(zip(header, (value or None for value in values), strict=True))
    except csv.Error as error:
        if "field limit" in str(error):
            raise DataError(
                f"{path}, line {reader.line_num} has a value of more than {csv.field_size_limit()} characters, such as "
                "an image in base64; a text, or the path of an image file, would fit"
            ) from error
        raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


def _scan_columns(files: Sequence[Path]) -> dict[str, bool]:
    """Return for each column whether its first value is a list; a column may occur in some rows only."""
    is_list: dict[str, bool | None] = {}
    for _, entry in chain.from_iterable(map(_entries, files)):
        for column, value in entry.items():
            if is_list.setdefault(column, None) is None and value is not None:
                is_list[column] = isinstance(value, list)
    return {column: bool(known) for column, known in is_list.items()}


# a value and its place -> what Arrow stores
Parser = Callable[[Any, str], Any]


def _parsers(columns: Columns, *, has_lists: bool, is_csv: bool) -> dict[str, tuple[pa.DataType, Parser]]:
    """Return type and parser by column. has_lists: whether a row has all images of its prompt."""
    parsers: dict[str, tuple[pa.DataType, Parser]] = {}
    for role, column in columns.of_role.items():
        kind = KIND_OF_ROLE[role]
        single = kind.removesuffix("s") if kind in ("texts", "images", "numbers") else kind
        by_kind: dict[str, Parser] = {"number": _number_of_csv if is_csv else _number, "name": _name, "image": _path}
        parser = by_kind.get(single, _text)
        if single != kind and has_lists:
            parsers.setdefault(column, (pa.list_(TYPES[single]), _list_of(parser)))
        else:
            parsers.setdefault(column, (TYPES[single], parser))
    return parsers


def _batch(
    entries: Sequence[Entry], parsers: Mapping[str, tuple[pa.DataType, Parser]], schema: pa.Schema
) -> pa.RecordBatch:
    rows = []
    for place, entry in entries:
        values, problems = without_problems(
            {column: parse(entry.get(column), f"{place}: {column}") for column, (_, parse) in parsers.items()}
        )
        rows.append({**values, PROBLEMS: problems})
    return pa.RecordBatch.from_pylist(rows, schema=schema)


def _text(value: Any, place: str) -> str | Unreadable | None:
    return text_or_problem(value)


def _path(value: Any, place: str) -> str | Unreadable | None:
    return text_or_problem(value, wanted="a path")


def _name(value: Any, place: str) -> str | Unreadable | None:
    return None if value is None else text_or_problem(str(value))


def _number(value: Any, place: str) -> float | None:
    return None if value is None else number_of_json(value, place)


def _number_of_csv(value: Any, place: str) -> float | None:
    return None if value is None else number_of_text(value, place)


def number_of_json(value: Any, place: str) -> float:
    """Return a JSON value as a number. Raises DataError with its place if it is not a number."""
    if not isinstance(value, bool | int | float):
        raise DataError(f"{place} is {value!r:.60}; a number would fit")
    try:
        return float(value)
    except OverflowError:
        raise DataError(f"{place} is a number of {len(str(value))} digits; a smaller one would fit") from None


def number_of_text(text: str, place: str) -> float | None:
    """Return a text as a number, or None for a blank text. Raises DataError with its place if it is not a number."""
    word = text.strip().lower()
    if not word or word in WORDS_OF_NUMBERS:
        return WORDS_OF_NUMBERS.get(word)
    try:
        return float(word)
    except ValueError:
        raise DataError(f"{place} is {text!r:.60}; a number, true or false would fit") from None


def _list_of(parse: Parser) -> Parser:
    def parse_list(value: Any, place: str) -> list[Any] | None:
        if value is None:
            return None
        if not isinstance(value, list):
            raise DataError(f"{place} is {type(value).__name__}; a list, one value for each image, would fit")
        return [parse(each, place) for each in value]

    return parse_list
