"""Drawn sets as parquet and as save_to_disk folders, with what programs that write them do."""

from __future__ import annotations

import decimal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, disable_progress_bars
from drawn_pairs import TORN, DrawnSet, Row, image_file

Shard = dict[str, pa.Array]
NAMES = {
    "labelled": {"prompt": "caption", "images": ("jpg_0", "jpg_1"), "verdicts": "label_0", "format": "pickapic"},
    "ordered": {"prompt": "prompt", "images": ("chosen", "rejected"), "verdicts": None, "format": "chosen_rejected"},
    "lists": {"prompt": "prompt", "images": "images", "verdicts": "rank", "format": "ranked"},
    "grouped": {"prompt": "prompt", "images": "image", "verdicts": "rank", "format": "ranked"},
}


def write_parquet(drawn: DrawnSet) -> DrawnSet:
    """Write the rows as one to three parquet files, and return the set."""
    draw, names = drawn.draw, NAMES[drawn.layout]
    drawn.fields["format"] = names["format"]
    for quirk in draw.sample(ROW_QUIRKS, draw.randrange(0, 3)):
        quirk(drawn)
    ends = sorted({len(drawn.rows), *(draw.randrange(1, len(drawn.rows)) for _ in range(draw.randrange(0, 3)))})
    shards = [_columns(drawn, drawn.rows[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    for quirk in draw.sample(SHARD_QUIRKS, draw.randrange(0, 3)):
        quirk(drawn, shards)
    if draw.random() < 0.15 and not drawn.refusal:
        return _saved(drawn, shards)
    paths = _paths(drawn, len(shards))
    refusing = draw.choice(REFUSED) if draw.random() < 0.3 and not drawn.refusal else None
    if refusing is not None and refusing not in REFUSED_FILES:
        refusing(drawn, shards, paths)
    for path, shard in zip(paths, shards, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(shard), path, **_options(drawn))
    if refusing in REFUSED_FILES:
        refusing(drawn, shards, paths)
    return drawn


def _table(shard: Shard) -> pa.Table:
    names = [name.removesuffix(" again") for name in shard]
    return pa.Table.from_arrays(list(shard.values()), names=names)


def _options(drawn: DrawnSet) -> dict[str, Any]:
    draw = drawn.draw
    return {
        "compression": draw.choice(["snappy", "none", "zstd", "gzip"]),
        "row_group_size": draw.choice([1, 2, 1000]),
        "use_dictionary": draw.random() < 0.5,
        "data_page_version": draw.choice(["1.0", "2.0"]),
        "write_page_index": draw.random() < 0.3,
        "store_schema": draw.random() < 0.7,
    }


def _columns(drawn: DrawnSet, rows: list[Row]) -> Shard:
    """Return a file's columns; each file has types of its own, as if another program had written it."""
    draw, names = drawn.draw, NAMES[drawn.layout]
    text_type = draw.choice([pa.string(), pa.string(), pa.large_string(), pa.string_view()])
    texts = pa.array([row.prompt for row in rows], text_type)
    is_encoded = text_type != pa.string_view() and draw.random() < 0.2
    columns = {names["prompt"]: texts.dictionary_encode() if is_encoded else texts}
    as_struct = drawn.seeded("struct") < 0.4
    if drawn.layout == "lists":
        columns["images"] = _images([_values(row) for row in rows], as_struct, in_lists=True)
        ranks = pa.list_(draw.choice([pa.float64(), pa.float32()]))
        columns["rank"] = pa.array([row.verdicts for row in rows], ranks)
    elif drawn.layout == "grouped":
        columns["image"] = _images([_values(row)[0] for row in rows], as_struct)
        columns["rank"] = pa.array([row.verdicts[0] for row in rows], pa.float64())
        group = [row.group for row in rows]
        columns["group"] = pa.array(group, pa.int64()) if as_struct else pa.array(list(map(str, group)), pa.string())
    else:
        for place, name in enumerate(names["images"]):
            columns[name] = _images([_values(row)[place] for row in rows], as_struct)
    if drawn.layout == "labelled":
        columns["label_0"] = _labels(drawn, [row.verdicts[0] for row in rows])
    if {"confidence", "min_confidence"} & drawn.fields.keys() or drawn.seeded("confidence") < 0.3:
        columns["confidence"] = pa.array([row.confidence for row in rows], draw.choice([pa.float64(), pa.float32()]))
    return columns


def _values(row: Row) -> list[Any]:
    values: list[Any] = [image_file(number) for number in row.images]
    if row.odd_image is not None:
        values[row.odd_image[0]] = row.odd_image[1]
    return values


def _images(values: list[Any], as_struct: bool, *, in_lists: bool = False) -> pa.Array:
    one = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if as_struct else pa.binary()

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(whole, value))
        return {"bytes": value, "path": None} if as_struct and value is not None else value

    return pa.array(list(map(whole, values)), pa.list_(one) if in_lists else one)


def _labels(drawn: DrawnSet, labels: list[float | None]) -> pa.Array:
    if set(labels) <= {0, 1, None}:
        kind = drawn.draw.choice(["double", "int", "bool"])
        if kind == "int":
            return pa.array([None if label is None else int(label) for label in labels], pa.int8())
        if kind == "bool":
            return pa.array([None if label is None else bool(label) for label in labels], pa.bool_())
    if drawn.draw.random() < 0.2:
        return pa.array([None if each is None else decimal.Decimal(str(each)) for each in labels], pa.decimal128(5, 2))
    return pa.array(labels, drawn.draw.choice([pa.float64(), pa.float32(), pa.float16()]))


def _paths(drawn: DrawnSet, number: int) -> list[Path]:
    """Return the names of the files, as one of several programs chooses them, and set what is to be opened."""
    draw, folder = drawn.draw, drawn.folder
    drawn.dataset = folder
    kind = draw.choice(["plain", "hub", "hashed", "spark", "patterns", "dash", "linked", "numbered"])
    if number == 1 and draw.random() < 0.3:
        drawn.dataset = folder / "any name.parquet"
        return [drawn.dataset]
    drawn.words.append(f"{number} files, names of {kind}")
    if kind == "patterns":
        drawn.fields["files"] = ["*/x?.parquet"]
        return [folder / f"20{place:02}" / f"x{place}.parquet" for place in range(number)]
    if kind == "linked":
        elsewhere = folder.with_name(f"{folder.name} elsewhere")
        elsewhere.mkdir(parents=True)
        folder.mkdir(parents=True)
        (folder / "data").symlink_to(elsewhere)
        return [elsewhere / f"train-{place}.parquet" for place in range(number)]
    if kind == "dash":
        drawn.fields["split"] = "train-v2"
    stem = {
        "plain": "train-{0:05}-of-{1:05}",
        "hub": "data/train-{0:05}-of-{1:05}",
        "hashed": "data/train-{0:05}-of-{1:05}-0123456789abcde{0}",
        "spark": "train/part-{0:05}-9f8a1c00-1111-2222-3333-444455556666-c000.snappy",
        "dash": "train-v2-{0:05}-of-{1:05}",
        "numbered": "train/{0:04}",
    }[kind]
    return [folder / f"{stem.format(place, number)}.parquet" for place in range(number)]


def _saved(drawn: DrawnSet, shards: list[Shard]) -> DrawnSet:
    """Write what `datasets` reads from the files as its own folder."""
    table = pa.concat_tables(
        [
            pa.table({name: _plain(column) for name, column in shard.items() if "unused" not in name})
            for shard in shards
        ],
        promote_options="permissive",
    )
    drawn.words.append("save_to_disk")
    disable_progress_bars()
    drawn.dataset = drawn.folder
    Dataset(table).save_to_disk(drawn.folder, max_shard_size=drawn.draw.choice(["1KB", "1GB"]))
    return drawn


def _plain(column: pa.Array) -> pa.Array:
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    wanted = {pa.string_view(): pa.large_string(), pa.float16(): pa.float32()}.get(column.type, column.type)
    wanted = pa.float64() if pa.types.is_decimal(wanted) or pa.types.is_boolean(wanted) else wanted
    return column.cast(pa.float64()).cast(wanted) if column.type == pa.float16() else column.cast(wanted)


# ---- rows ----


def _some_row(drawn: DrawnSet) -> tuple[int, Row]:
    place = drawn.draw.randrange(len(drawn.rows))
    return place, drawn.rows[place]


def _no_prompt(drawn: DrawnSet) -> None:
    place, row = _some_row(drawn)
    row.prompt = None
    drawn.words.append(f"no prompt in row {place}")


def _odd_image(drawn: DrawnSet) -> None:
    place, row = _some_row(drawn)
    value = drawn.draw.choice([None, TORN, b"", b"no image"])
    row.odd_image = (0, value)
    if drawn.layout != "lists" or len(row.images) > 1:
        drawn.words.append(f"image {value!r:.20} in row {place}")


def _wrong_number_of_ranks(drawn: DrawnSet) -> None:
    place, row = _some_row(drawn)
    if drawn.layout == "lists":
        row.verdicts = [*row.verdicts, 9] if drawn.draw.random() < 0.5 else row.verdicts[:-1]
        row.is_bad = True
        drawn.words.append(f"{len(row.verdicts)} ranks and {len(row.images)} images in row {place}")


def _label_of_seven(drawn: DrawnSet) -> None:
    place, row = _some_row(drawn)
    if drawn.layout == "labelled" and place < drawn.fields.get("max_rows", 99) and not drawn.refusal:
        row.verdicts = [7.0]
        drawn.refusal = ("label_0 is", f"in row {place}")


def _no_rank(drawn: DrawnSet) -> None:
    place, row = _some_row(drawn)
    is_ranked = drawn.layout in ("lists", "grouped") and row.verdicts
    if is_ranked and not drawn.refusal and place < drawn.fields.get("max_rows", 99):
        row.verdicts[-1] = None
        drawn.refusal = ("rank", f"null in row {place}")


ROW_QUIRKS: list[Callable[[DrawnSet], None]] = [
    _no_prompt,
    _odd_image,
    _odd_image,
    _wrong_number_of_ranks,
    _label_of_seven,
    _no_rank,
]


# ---- files ----


def _unused_columns(drawn: DrawnSet, shards: list[Shard]) -> None:
    others: list[Callable[[int], pa.Array]] = [
        lambda rows: pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        lambda rows: pa.nulls(rows),
        lambda rows: pa.array([1] * rows, pa.duration("s")),
        lambda rows: pa.array(["x"] * rows),
    ]
    for shard in shards:
        rows = len(next(iter(shard.values())))
        shard["unused"] = drawn.draw.choice(others)(rows)
        if drawn.draw.random() < 0.3:
            shard["unused again"] = pa.nulls(rows)
    drawn.words.append("unused columns")


def _empty_shard(drawn: DrawnSet, shards: list[Shard]) -> None:
    columns: Mapping[str, pa.Array] = drawn.draw.choice([shards[0], {"x": pa.array(["x"])}])
    shards.insert(drawn.draw.randrange(len(shards) + 1), {name: column[:0] for name, column in columns.items()})
    drawn.words.append("an empty file")


def _shuffled_columns(drawn: DrawnSet, shards: list[Shard]) -> None:
    for number, shard in enumerate(shards):
        shards[number] = dict(drawn.draw.sample(list(shard.items()), len(shard)))
    drawn.words.append("columns in another order")


def _text_that_is_not_utf8(drawn: DrawnSet, shards: list[Shard]) -> None:
    column = NAMES[drawn.layout]["prompt"]
    shard = drawn.draw.choice([shard for shard in shards if len(next(iter(shard.values())))])
    if len({row.prompt for row in drawn.rows}) != len(drawn.rows) or column not in shard:
        return  # prompts that are the same are counted together
    texts = shard[column]
    if texts.type != pa.string():
        return
    first = sum(len(next(iter(each.values()))) for each in shards[: [id(each) for each in shards].index(id(shard))])
    encoded = [None if text is None else text.encode() for text in texts.to_pylist()]
    encoded[0] = b"\xff\xfe"
    as_bytes = pa.array(encoded, pa.binary())
    shard[column] = pa.StringArray.from_buffers(len(encoded), *as_bytes.buffers()[1:], as_bytes.buffers()[0])
    drawn.rows[first].is_bad, drawn.rows[first].prompt = True, "\ufffd\ufffd"
    drawn.words.append(f"row {first} is not UTF-8")


def _ids(drawn: DrawnSet, shards: list[Shard]) -> None:
    first = 0
    for shard in shards:
        rows = len(next(iter(shard.values())))
        shard["my id"] = pa.array(range(first, first + rows), drawn.draw.choice([pa.int64(), pa.int32()]))
        first += rows
    drawn.fields["columns"] = ["id=my id"]
    drawn.words.append("ids")


SHARD_QUIRKS: list[Callable[[DrawnSet, list[Shard]], None]] = [
    _unused_columns,
    _empty_shard,
    _shuffled_columns,
    _text_that_is_not_utf8,
    _ids,
]


# ---- files that are refused ----


def _last_with_rows(shards: list[Shard]) -> int:
    return max(number for number, shard in enumerate(shards) if len(next(iter(shard.values()))))


def _column_missing(drawn: DrawnSet, shards: list[Shard], paths: list[Path]) -> None:
    with_rows = [number for number, shard in enumerate(shards) if len(next(iter(shard.values())))]
    if len(with_rows) > 1:
        column = drawn.draw.choice(sorted(set(shards[with_rows[-1]]) - {"unused", "unused again"}))
        if any(column in shards[number] for number in with_rows[:-1]):
            del shards[with_rows[-1]][column]
            drawn.refusal = (paths[with_rows[-1]].name, f"no column {column}")


def _column_twice(drawn: DrawnSet, shards: list[Shard], paths: list[Path]) -> None:
    number, column = _last_with_rows(shards), NAMES[drawn.layout]["prompt"]
    shards[number][f"{column} again"] = shards[number][column]
    drawn.refusal = (paths[number].name, f"column {column} 2 times")


def _other_type(drawn: DrawnSet, shards: list[Shard], paths: list[Path]) -> None:
    number, column = _last_with_rows(shards), NAMES[drawn.layout]["prompt"]
    shards[number][column] = pa.array([b"x"] * len(shards[number][column]), pa.binary())
    drawn.refusal = (column, "binary")


def _huge_number(drawn: DrawnSet, shards: list[Shard], paths: list[Path]) -> None:
    if drawn.layout == "labelled" and len(shards) == 1:
        shards[0]["label_0"] = pa.array([1] * (len(drawn.rows) - 1) + [2**60], pa.int64())
        if "max_rows" not in drawn.fields:
            drawn.refusal = (f"label_0 is {2**60} in row {len(drawn.rows) - 1}",)
        else:
            for row in drawn.rows:
                row.verdicts = [1]


def _nested_group(drawn: DrawnSet, shards: list[Shard], paths: list[Path]) -> None:
    if drawn.layout == "grouped":
        for shard in shards:
            shard["group"] = pa.array([[1]] * len(next(iter(shard.values()))), pa.list_(pa.int64()))
        drawn.refusal = ("group is", "list<")


def _torn(drawn: DrawnSet, shards: list[Shard], paths: list[Path]) -> None:
    path = drawn.draw.choice(paths)
    path.write_bytes(path.read_bytes()[: -drawn.draw.randrange(1, 200)])
    drawn.refusal = (path.name, "cannot be read as parquet")


def _file_missing(drawn: DrawnSet, shards: list[Shard], paths: list[Path]) -> None:
    if len(paths) > 1 and "-of-" in paths[0].name:
        paths[-1].unlink()
        drawn.refusal = ("1 of", "files are missing")


REFUSED_FILES: list[Callable[[DrawnSet, list[Shard], list[Path]], None]] = [_torn, _file_missing]
REFUSED = [*REFUSED_FILES, _column_missing, _column_missing, _column_twice, _other_type, _huge_number, _nested_group]
