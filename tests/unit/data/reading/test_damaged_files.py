"""Damaged files give pairs, bad rows, or an error of this project, and nothing else."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaged_files import damaged
from datasets import Dataset
from pair_files import config, file_of, picture, row

from ds_dpo.data.images import decode_rgb, read_size
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import DsDpoError

FLIPS, CUTS, SEED = 300, 100, 17
IMAGES = [file_of(picture(number, width=12, height=8)) for number in range(4)]


def plain_parquet():
    buffer = io.BytesIO()
    rows = [row(n, jpg_0=IMAGES[0], jpg_1=IMAGES[1], model_0="a", model_1="b", confidence=0.5) for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="none", row_group_size=3)
    return "train.parquet", buffer.getvalue(), {"models": ["a", "b"], "max_pairs_per_prompt": 2}


def packed_parquet_of_lists():
    buffer = io.BytesIO()
    rows = [
        {"prompt": f"p{n}", "images": [{"bytes": each, "path": "x"} for each in IMAGES], "rank": [1, 2, 3, 3]}
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return "train.parquet", buffer.getvalue(), {"format": "ranked", "ties": "soft"}


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number in range(3):
            for ending, content in (
                ("jpg_0.jpg", IMAGES[0]),
                ("jpg_1.jpg", IMAGES[1]),
                ("json", json.dumps({"prompt": f"p{number}", "label_0": number % 2}).encode()),
            ):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return "train.tar", buffer.getvalue(), {"format": "webdataset"}


def json_lines():
    lines = [{"prompt": "pä", "chosen": f"{n}.png", "rejected": "1.png", "confidence": 0.5} for n in range(4)]
    return "train.jsonl", "\n".join(map(json.dumps, lines)).encode(), {"format": "manifest", "confidence": "weight"}


def json_list():
    entries = [{"prompt": "pä", "images": ["0.png", "1.png"], "rank": [n, 1.5]} for n in range(4)]
    return "train.json", json.dumps(entries, ensure_ascii=False).encode(), {"format": "ranked"}


def csv():
    lines = ["prompt,image,image2,label_0", *(f'"p, {n}",{n}.png,1.png,{n % 2}' for n in range(4))]
    return "train.csv", "\r\n".join(lines).encode(), {"format": "manifest"}


KINDS = [plain_parquet, packed_parquet_of_lists, tar, json_lines, json_list, csv]


def read_all(path, *, in_file_order, **fields):
    """Read all pairs as far as they can be read, images too; return what was refused, in words."""
    refused = []
    try:
        data = config(path, cache_dir=str(path.parent / "cache"), **fields)
        source = open_source(data, say=lambda line: None, in_file_order=in_file_order)
        for index in range(len(source)):
            try:
                record = source.read(index)
                decode_rgb(record.chosen)
                read_size(record.rejected)
            except DsDpoError as error:
                refused.append(str(error))
    except DsDpoError as error:
        refused.append(str(error))
    return refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_file_ends_in_words(kind, tmp_path):
    name, content, fields = kind()
    refused = 0
    for number, (what, changed) in enumerate(damaged(content, flips=FLIPS, cuts=CUTS, seed=SEED)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for place, image in enumerate(IMAGES):
            (folder / f"{place}.png").write_bytes(image)
        (folder / name).write_bytes(changed)
        for in_file_order in (True, False):
            try:
                said = read_all(folder / name, in_file_order=in_file_order, **fields)
            except Exception as error:
                raise AssertionError(f"{name}, {what}: {type(error).__name__}: {error}") from error
            assert all("\n" not in line and len(line) < 2000 for line in said), f"{name}, {what}: {said}"
            refused += bool(said)
    assert refused > CUTS  # or nothing was damaged


def test_a_damaged_saved_folder_ends_in_words(tmp_path):
    folder = tmp_path / "saved"
    Dataset.from_list([row(n) for n in range(3)]).save_to_disk(folder)
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        content = (folder / name).read_bytes()
        for what, changed in damaged(content, flips=40, cuts=20, seed=SEED):
            (folder / name).write_bytes(changed)
            try:
                read_all(folder, in_file_order=False)
            except Exception as error:
                raise AssertionError(f"{name}, {what}: {type(error).__name__}: {error}") from error
        (folder / name).write_bytes(content)
    assert read_all(folder, in_file_order=False) == []
