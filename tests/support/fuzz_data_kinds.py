"""The kinds of data sets that tests/fuzz.py damages: all pairs are read, in both ways, and their images decoded."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuzz_files import Prepare, Prepared, silent


def _read_pairs(dataset: Path, *, orders: Sequence[bool], **fields: Any) -> Callable[[], None]:
    """Return a function that reads all pairs. orders: True for straight from the files, False for training's way."""
    from pair_files import config

    from ds_dpo.data.images import decode_rgb, read_size
    from ds_dpo.data.reading.open_source import open_source
    from ds_dpo.errors import DataError

    cache = dataset.parent / "cache"
    data = config(dataset, cache_dir=str(cache), **fields)

    def read() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        refused: list[DataError] = []
        for in_file_order in orders:
            try:
                source = open_source(data, say=silent, in_file_order=in_file_order)
            except DataError as error:
                refused.append(error)
                continue
            for index in range(len(source)):
                try:
                    record = source.read(index)
                    decode_rgb(record.chosen)
                    read_size(record.rejected)
                except DataError as error:  # the loader counts it, and takes another
                    refused.append(error)
        if refused:
            raise refused[0]

    return read


def _images(kind: str, count: int) -> list[bytes]:
    from pair_files import file_of, picture

    return [file_of(picture(number), kind) for number in range(count)]


def _write_parquet(folder: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> tuple[Path, Path]:
    """Return the data set and its only file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "pairs" / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return folder / "pairs", path


def _parquet(folder: Path) -> Prepared:
    from pair_files import row

    rows = [row(number, confidence=0.5, model_0="a", model_1="b") for number in range(6)]
    dataset, path = _write_parquet(folder, rows, row_group_size=3)
    return Prepared([path], _read_pairs(dataset, orders=(True, False), models=["a", "b"], max_pairs_per_prompt=2))


def _nested_parquet(folder: Path) -> Prepared:
    images = [{"bytes": each, "path": "x"} for each in _images("PNG", 4)]
    rows = [{"prompt": f"p{number}", "images": images, "rank": [1, 2, 3, 3]} for number in range(4)]
    dataset, path = _write_parquet(folder, rows, compression="none")
    return Prepared([path], _read_pairs(dataset, orders=(True, False), format="ranked", ties="soft"))


def _saved_folder(folder: Path) -> Prepared:
    from datasets import Dataset, disable_progress_bars
    from pair_files import row

    disable_progress_bars()
    dataset = folder / "pairs"
    Dataset.from_list([row(number) for number in range(3)]).save_to_disk(dataset)
    return Prepared(sorted(path for path in dataset.iterdir() if path.is_file()), _read_pairs(dataset, orders=(False,)))


def _tar(folder: Path) -> Prepared:
    path = folder / "pairs" / "train.tar"
    path.parent.mkdir()
    images = _images("JPEG", 8)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            members = {
                "jpg_0.jpg": images[2 * number],
                "jpg_1.jpg": images[2 * number + 1],
                "json": json.dumps({"caption": f"prompt {number} grün", "label_0": 1.0, "label_1": 0.0}).encode(),
            }
            for ending, content in members.items():
                entry = tarfile.TarInfo(f"{number:04}.{ending}")
                entry.size = len(content)
                entry.pax_headers = {"comment": "grün"}
                tar.addfile(entry, io.BytesIO(content))
    return Prepared([path], _read_pairs(path.parent, orders=(False,), format="webdataset"))


def _text(name: str, content: str, **fields: Any) -> Prepare:
    """Return how to prepare a text file beside the images 0.png to 3.png."""

    def prepare(folder: Path) -> Prepared:
        path = folder / "pairs" / name
        path.parent.mkdir()
        for number, image in enumerate(_images("PNG", 4)):
            (path.parent / f"{number}.png").write_bytes(image)
        path.write_text(content, encoding="utf-8")
        return Prepared([path], _read_pairs(path.parent, orders=(False,), **fields))

    return prepare


def _lines() -> str:
    pairs = [{"prompt": "pä", "chosen": f"{n}.png", "rejected": "1.png", "confidence": 0.5} for n in range(4)]
    return "\n".join(map(json.dumps, pairs))


def _list() -> str:
    entries = [{"prompt": "pä", "images": ["0.png", "1.png"], "rank": [n, 1.5]} for n in range(4)]
    return json.dumps(entries, ensure_ascii=False)


def _table() -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["prompt", "image", "image2", "label_0"])
    writer.writerows([f'a "p", {number}', f"{number}.png", "1.png", number % 2] for number in range(4))
    return text.getvalue()


DATA_KINDS: dict[str, Prepare] = {
    "parquet": _parquet,
    "nested parquet": _nested_parquet,
    "saved folder": _saved_folder,
    "tar": _tar,
    "JSON lines": _text("train.jsonl", _lines(), format="manifest", confidence="weight"),
    "JSON list": _text("train.json", _list(), format="ranked"),
    "CSV": _text("train.csv", _table(), format="manifest"),
}
