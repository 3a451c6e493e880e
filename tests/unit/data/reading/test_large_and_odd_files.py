"""Row groups larger than Arrow decodes at once, and what editors and programs leave in tars."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import config, file_of, picture

from ds_dpo.data.reading import parquet_rows
from ds_dpo.data.reading.open_source import open_source

IMAGES = [file_of(picture(number)) for number in range(4)]


def opened(path, tmp_path, **fields):
    data = config(path, cache_dir=str(tmp_path / "cache"), **fields)
    return open_source(data, say=lambda line: None)


@pytest.mark.parametrize("in_file_order", [True, False])
def test_nested_images_are_decoded_few_rows_at_once(in_file_order, tmp_path, monkeypatch):
    images = [[{"bytes": IMAGES[(row + place) % 4], "path": None} for place in range(2)] for row in range(40)]
    table = pa.table({"prompt": [f"p{row}" for row in range(40)], "images": images, "rank": [[2, 1]] * 40})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)  # one row group
    bytes_of_row = pq.read_metadata(path).row_group(0).total_byte_size // 40
    asked = []

    class LikeArrow(pq.ParquetFile):
        """Fails as Arrow does for nested columns of more than 2 GB at once; here of more than 5 rows."""

        def iter_batches(self, batch_size, **options):
            asked.append(batch_size)
            if batch_size > 5 and any("images" in column for column in options["columns"]):
                raise NotImplementedError("Nested data conversions not implemented for chunked array outputs")
            return super().iter_batches(batch_size, **options)

    monkeypatch.setattr(parquet_rows.pq, "ParquetFile", LikeArrow)
    monkeypatch.setattr(parquet_rows, "BYTES_DECODED_AT_ONCE", 5 * bytes_of_row + bytes_of_row // 2)
    data = config(path, format="ranked", cache_dir=str(tmp_path / "cache"))
    source = open_source(data, say=lambda line: None, in_file_order=in_file_order)
    records = [source.read(row) for row in range(40)]
    assert [record.prompt for record in records] == [f"p{row}" for row in range(40)]
    assert [record.chosen["bytes"] for record in records] == [IMAGES[(row + 1) % 4] for row in range(40)]
    assert set(asked) == {5}


# ---- tars ----

BOM = "\ufeff"
TEXTS = {
    "plain": ("txt", "hello", "hello"),
    "a byte order mark": ("txt", f"{BOM}hello", "hello"),
    "a line end": ("txt", "hello\r\n", "hello"),
    "both": ("original_prompt.txt", f"{BOM}hello\n", "hello"),
    "a line end within": ("txt", f"{BOM}two\nlines\n", "two\nlines"),
    "JSON with a byte order mark": ("json", BOM + json.dumps({"prompt": "hello"}), "hello"),
    "a mark within": ("txt", f"a{BOM}b", f"a{BOM}b"),
}
FILES_OF_PROGRAMS = {
    "README.md": b"# these are pairs",
    "LICENSE.txt": b"free",
    "Thumbs.db": b"\xd0\xcf",
    "desktop.ini": b"[x]",
    "__MACOSX/._0.chosen.png": b"\0\5\26\7",
    "d/@eaDir/0.chosen.png@x.jpg": b"x",
    ".DS_Store": b"x",
}


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key, ending, text):
    images = {f"{key}.chosen.png": IMAGES[0], f"{key}.rejected.png": IMAGES[1]}
    return images | {f"{key}.{ending}": text.encode()}


@pytest.mark.parametrize("case", TEXTS)
def test_a_prompt_has_neither_the_mark_nor_the_line_end_of_its_editor(case, tmp_path):
    ending, text, prompt = TEXTS[case]
    path = tar_of(tmp_path / "x.tar", sample("0", ending, text))
    assert opened(path, tmp_path, format="webdataset").read(0).prompt == prompt


def test_files_of_programs_are_no_samples(tmp_path):
    plain = tar_of(tmp_path / "plain.tar", sample("d/0", "txt", "p0") | sample("d/1", "txt", "p1"))
    members = dict(list(FILES_OF_PROGRAMS.items())[:4]) | sample("d/0", "txt", "p0")
    members |= dict(list(FILES_OF_PROGRAMS.items())[4:]) | sample("d/1", "txt", "p1")
    mixed = tar_of(tmp_path / "mixed.tar", members)
    for path in (plain, mixed):
        source = opened(path, tmp_path, format="webdataset")
        assert (source.counts["rows"], source.counts["pairs"]) == (2, 2)
        assert [source.read(row).prompt for row in range(2)] == ["p0", "p1"]


def test_a_sample_that_lost_its_images_is_a_bad_row_and_no_file_of_a_program(tmp_path):
    path = tar_of(tmp_path / "x.tar", sample("0", "txt", "p0") | {"1.txt": b"p1"})
    assert opened(path, tmp_path, format="webdataset").counts["rows"] == 2
