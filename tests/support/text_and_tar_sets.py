"""Drawn sets as manifests and rankings in text files beside their images, and as tars of samples."""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drawn_pairs import TORN, DrawnSet, Row, image_file

NAMES: dict[str, Any] = {
    "labelled": {"images": ("image", "image2"), "format": "manifest"},
    "ordered": {"images": ("chosen", "rejected"), "format": "manifest"},
    "lists": {"images": "images", "format": "ranked"},
    "grouped": {"images": "image", "format": "ranked"},
}
Entry = dict[str, Any]


# ---- text ----


def write_text(drawn: DrawnSet) -> DrawnSet:
    """Write the rows as JSON lines, a JSON list or CSV, with images beside them, and return the set."""
    draw = drawn.draw
    kind = draw.choice(["jsonl", "json"] if drawn.layout == "lists" else ["jsonl", "json", "csv"])
    drawn.fields["format"] = NAMES[drawn.layout]["format"]
    drawn.words.append(kind)
    drawn.folder.mkdir(parents=True)
    for row in drawn.rows:
        for number in row.images:
            (drawn.folder / f"{number}.png").write_bytes(image_file(number))
    (drawn.folder / "torn.png").write_bytes(TORN)
    entries = [_entry(drawn, row) for row in drawn.rows]
    for quirk in draw.sample(TEXT_QUIRKS, draw.randrange(0, 3)):
        quirk(drawn, entries, kind)
    refusing = draw.choice(REFUSED_TEXTS) if draw.random() < 0.3 else None
    if refusing is not None:
        refusing(drawn, entries, kind)
    text = {"jsonl": _lines, "json": _list, "csv": _table}[kind](drawn, entries)
    if refusing is None and draw.random() < 0.2:
        text = _cut(drawn, text, kind)
    name = draw.choice([f"train.{kind}", f"metadata.{kind}", "my pairs." + kind])
    path = drawn.folder / name
    encoding = draw.choice(["utf-8", "utf-8", "utf-8-sig"])
    path.write_text(text, encoding=encoding, newline="")
    drawn.words.append(f"{name} in {encoding}")
    drawn.dataset = path if name.startswith("my") or draw.random() < 0.3 else drawn.folder
    return drawn


def _entry(drawn: DrawnSet, row: Row) -> Entry:
    paths = [drawn.draw.choice(["{}.png", "./{}.png", "x/../{}.png"]).format(number) for number in row.images]
    names = NAMES[drawn.layout]["images"]
    entry: Entry = {"prompt": row.prompt, "other": drawn.draw.choice([None, "x", 3])}
    if drawn.layout == "lists":
        entry |= {"images": paths, "rank": row.verdicts}
    elif drawn.layout == "grouped":
        entry |= {"image": paths[0], "rank": row.verdicts[0], "group": f"g{row.group}"}
    else:
        entry |= dict(zip(names, paths, strict=True))
    if drawn.layout == "labelled":
        entry["label_0"] = row.verdicts[0]
    return entry | {"confidence": row.confidence}


def _lines(drawn: DrawnSet, entries: list[Entry]) -> str:
    is_ascii = drawn.draw.random() < 0.5
    end = drawn.draw.choice(["\n", "\r\n", "\n\n"])
    return end.join(json.dumps(entry, ensure_ascii=is_ascii) for entry in entries) + drawn.draw.choice(["", "\n"])


def _list(drawn: DrawnSet, entries: list[Entry]) -> str:
    return json.dumps(entries, ensure_ascii=drawn.draw.random() < 0.5, indent=drawn.draw.choice([None, 1]))


def _table(drawn: DrawnSet, entries: list[Entry]) -> str:
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(column for entry in entries for column in entry))
    quoting = drawn.draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(text, quoting=quoting, lineterminator=drawn.draw.choice(["\n", "\r\n"]))
    writer.writerow(columns)
    writer.writerows([entry.get(column) for column in columns] for entry in entries)
    return text.getvalue()


def _no_prompt(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    place = drawn.draw.randrange(len(entries))
    entries[place]["prompt"] = drawn.rows[place].prompt = None
    drawn.words.append(f"no prompt in row {place}")


def _odd_prompt(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    place = drawn.draw.randrange(len(entries))
    if kind != "csv":
        entries[place]["prompt"] = drawn.draw.choice([["a"], 7, {"a": 1}, True])
        drawn.rows[place].prompt = None
        drawn.words.append(f"an odd prompt in row {place}")


def _odd_image(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    place = drawn.draw.randrange(len(entries))
    value = drawn.draw.choice(
        ["torn.png", "nowhere.png", "../secret.png", "https://x/1.png", base64.b64encode(image_file(0)).decode(), None]
        + ([] if kind == "csv" else [3, {"path": "torn.png"}])
    )
    name = NAMES[drawn.layout]["images"]
    if drawn.layout == "lists":
        entries[place]["images"] = [value, *entries[place]["images"][1:]]
    else:
        entries[place][name if isinstance(name, str) else name[0]] = value
    drawn.rows[place].odd_image = (0, value)
    drawn.words.append(f"image {value!r:.30} in row {place}")


def _words_for_labels(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    if kind == "csv" and drawn.layout == "labelled":
        words = {1.0: "TRUE", 0.0: " false", 0.5: "5e-1", None: " "}
        for entry in entries:
            entry["label_0"] = words[entry["label_0"]]


def _more_images_than_ranks(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    place = drawn.draw.randrange(len(entries))
    if drawn.layout == "lists":
        entries[place]["images"] = [*entries[place]["images"], "torn.png"]
        drawn.rows[place].images.append(0)
        drawn.rows[place].is_bad = True
        drawn.words.append(f"more images than ranks in row {place}")


TEXT_QUIRKS: list[Callable[[DrawnSet, list[Entry], str], None]] = [
    _no_prompt,
    _odd_prompt,
    _odd_image,
    _odd_image,
    _words_for_labels,
    _more_images_than_ranks,
]


def _place(kind: str, number: int) -> str:
    return f"entry {number}" if kind == "json" else "line "


def _number_of_words(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    number = drawn.draw.randrange(len(entries))
    column = {"labelled": "label_0", "ordered": "confidence"}.get(drawn.layout, "rank")
    entries[number][column] = ["one"] if drawn.layout == "lists" else "one"
    drawn.refusal = (_place(kind, number), column, "'one'; a number")


def _label_of_seven(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    if drawn.layout == "labelled" and "max_rows" not in drawn.fields:
        entries[-1]["label_0"] = 7
        drawn.refusal = ("label_0 is 7", f"row {len(entries) - 1}")


def _no_column(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    for entry in entries:
        del entry["prompt"]
    drawn.refusal = ("has no column prompt",)


def _no_object(drawn: DrawnSet, entries: list[Entry], kind: str) -> None:
    if kind != "csv":
        number = drawn.draw.randrange(1, len(entries))  # lines that begin with [ are read as a list
        entries[number] = ["x"]  # type: ignore[call-overload]
        drawn.refusal = (_place(kind, number), "is list")


REFUSED_TEXTS = [_number_of_words, _label_of_seven, _no_column, _no_object]


def _cut(drawn: DrawnSet, text: str, kind: str) -> str:
    """Cut the last entry, so that it is none."""
    drawn.refusal = {"json": ("not a JSON list",), "jsonl": ("line ", "is not JSON"), "csv": ("line ",)}[kind]
    kept = text.rstrip()
    return kept[:-3] if kind != "csv" else kept[: kept.rstrip().rindex(",")] + "\n"


# ---- tars ----


def write_tar(drawn: DrawnSet) -> DrawnSet:
    """Write labelled or ordered rows as one or two tars, and return the set."""
    draw = drawn.draw
    drawn.fields["format"] = "webdataset"
    samples = [_sample(drawn, place, row) for place, row in enumerate(drawn.rows)]
    for quirk in draw.sample(TAR_QUIRKS, draw.randrange(0, 3)):
        quirk(drawn, samples)
    refusing = draw.choice(REFUSED_TARS) if draw.random() < 0.3 else None
    if refusing in REFUSED_SAMPLES:
        refusing(drawn, samples)
    end = draw.randrange(1, len(samples))
    parts = [samples] if draw.random() < 0.5 else [samples[:end], samples[end:]]
    drawn.folder.mkdir(parents=True)
    names = [f"train-{number}.tar" if len(parts) > 1 else "x.tar" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        _write_tar(drawn, drawn.folder / name, part)
    drawn.dataset = drawn.folder if len(parts) > 1 else drawn.folder / "x.tar"
    if refusing is not None and refusing not in REFUSED_SAMPLES:
        refusing(drawn, drawn.folder / names[-1])
    drawn.words.append(f"{len(parts)} tars")
    return drawn


def _sample(drawn: DrawnSet, place: int, row: Row) -> dict[str, bytes]:
    names = ("jpg_0.jpg", "jpg_1.png") if drawn.layout == "labelled" else ("chosen.png", "rejected.jpeg")
    key = f"d.x/{place:03}"
    members = {f"{key}.{name}": image_file(number) for name, number in zip(names, row.images, strict=True)}
    values: dict[str, Any] = {"confidence": row.confidence}
    if drawn.layout == "labelled":
        values["label_0"] = row.verdicts[0]
    if drawn.seeded("json") < 0.5:
        members[f"{key}.json"] = json.dumps({"prompt": row.prompt, **values}).encode()
        return members
    for name, value in values.items():
        if value is not None:
            members[f"{key}.{name}.txt"] = f"{value}\n".encode()
    if row.prompt is not None:
        end = drawn.draw.choice(["", "\n", "\r\n"])
        members[f"{key}.txt"] = f"{row.prompt}{end}".encode(drawn.draw.choice(["utf-8", "utf-8-sig"]))
    return members


def _write_tar(drawn: DrawnSet, path: Path, samples: list[dict[str, bytes]]) -> None:
    kind = drawn.draw.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(path, "w", format=kind) as tar:
        if drawn.draw.random() < 0.5:
            folder = tarfile.TarInfo("d.x")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for members in samples:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


Samples = list[dict[str, bytes]]


def _files_of_programs(drawn: DrawnSet, samples: Samples) -> None:
    others = {"README.md": b"# pairs", "Thumbs.db": b"x", "d.x/notes.txt": b"seen", "__MACOSX/d.x/._000.jpg": b"\0"}
    for name, content in drawn.draw.sample(list(others.items()), 2):
        samples.insert(drawn.draw.randrange(len(samples) + 1), {name: content})
    drawn.words.append("files of programs")


def _endings_in_capitals(drawn: DrawnSet, samples: Samples) -> None:
    for number, members in enumerate(samples):
        samples[number] = {
            name[: name.rindex(".")] + name[name.rindex(".") :].upper(): content for name, content in members.items()
        }


def _row_of(drawn: DrawnSet, samples: Samples) -> tuple[Row, dict[str, bytes]]:
    """Return a row and its sample; files of programs may be between the samples."""
    members = drawn.draw.choice([each for each in samples if any(name.startswith("d.x/0") for name in each)])
    return drawn.rows[int(next(iter(members))[4:7])], members


def _torn_image(drawn: DrawnSet, samples: Samples) -> None:
    row, members = _row_of(drawn, samples)
    name = next(iter(members))
    members[name] = TORN
    row.odd_image = (0, TORN)
    drawn.words.append(f"{name} is torn")


def _image_missing(drawn: DrawnSet, samples: Samples) -> None:
    row, members = _row_of(drawn, samples)
    name = next(iter(members))
    if "." in name.removeprefix("d.x/")[4:]:
        del members[name]
        row.odd_image = (0, None)
        drawn.words.append(f"{name} is missing")


TAR_QUIRKS: list[Callable[[DrawnSet, Samples], None]] = [
    _endings_in_capitals,
    _files_of_programs,
    _torn_image,
    _image_missing,
]


def _label_of_words(drawn: DrawnSet, samples: Samples) -> None:
    _, members = _row_of(drawn, samples)
    key = next(iter(members))[:7]
    for name in [name for name in members if not name.endswith((".jpg", ".png", ".jpeg"))]:
        del members[name]
    members[f"{key}.json"] = b'{"prompt": "p", "confidence": "often", "label_0": 1}'
    drawn.refusal = (key, "confidence", "'often'; a number")


def _no_json(drawn: DrawnSet, samples: Samples) -> None:
    _, members = _row_of(drawn, samples)
    key = next(iter(members))[:7]
    members.pop(f"{key}.JSON", None)
    members[f"{key}.json"] = b'{"prompt": '
    drawn.refusal = (f"{key}.json is not JSON",)


REFUSED_SAMPLES = [_label_of_words, _no_json]


def _two_in_one(drawn: DrawnSet, path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)
    drawn.refusal = (path.name, "another archive after its end")


def _torn_tar(drawn: DrawnSet, path: Path) -> None:
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data
    path.write_bytes(path.read_bytes()[: end + 1])
    drawn.refusal = (path.name,)


REFUSED_TARS: list[Callable[..., None]] = [*REFUSED_SAMPLES, _two_in_one, _torn_tar]
