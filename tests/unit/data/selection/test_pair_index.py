"""The index of pairs on disk, the Arrow copy beside it, and aspect buckets: made once, whole or not at all."""

import errno
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from pair_files import config, file_of, picture, row

from ds_dpo.data.buckets import bucket_shapes
from ds_dpo.data.reading import build_index as building
from ds_dpo.data.reading import image_files
from ds_dpo.data.reading.arrow_copy import SIZE_MARGIN
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.reading.rows import ArrowRows
from ds_dpo.data.reading.shards import read_footers, uncompressed_bytes
from ds_dpo.data.selection.pair_index import ENTRY
from ds_dpo.errors import DataError


@pytest.fixture
def path(tmp_path):
    Dataset.from_list([row(n, label_0=float(n % 2)) for n in range(4)]).to_parquet(tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def opened(path, *, say=lambda line: None, in_file_order=False, **fields):
    data = config(path, **({"cache_dir": str(path.parent / "cache")} | fields))
    return open_source(data, say=say, in_file_order=in_file_order)


def index_folder(path):
    (folder,) = (path.parent / "cache" / "ds_dpo_pair_index").iterdir()
    return folder


def pairs_of(source):
    return [(source.read(n).prompt, source.read(n).chosen) for n in range(len(source))]


# ---- the index ----


def test_a_second_start_maps_the_index_and_reads_no_column(path, monkeypatch):
    first = opened(path)
    monkeypatch.setattr(ArrowRows, "table", lambda *arguments: pytest.fail("columns were read"))
    second = opened(path)
    assert isinstance(second.index.entries, np.memmap)
    assert pairs_of(second) == pairs_of(first)
    # beside it lies nothing half-written
    assert sorted(each.name for each in index_folder(path).iterdir()) == ["index.json", "pairs.npy"]
    assert len(list(index_folder(path).parent.iterdir())) == 1


def test_another_setting_or_another_file_has_another_index(path):
    opened(path)
    assert len(opened(path, max_rows=2)) == 2
    Dataset.from_list([row(0)]).to_parquet(path)
    assert len(opened(path)) == 1
    assert len(list((path.parent / "cache" / "ds_dpo_pair_index").iterdir())) == 3


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    "tear",
    [
        lambda folder: cut(folder / "pairs.npy"),
        lambda folder: (folder / "pairs.npy").unlink(),
        lambda folder: (folder / "pairs.npy").write_bytes(b""),
        lambda folder: np.save(folder / "pairs.npy", np.zeros(4)),
        lambda folder: np.save(folder / "pairs.npy", np.zeros(3, ENTRY)),
        lambda folder: cut(folder / "index.json"),
        lambda folder: (folder / "index.json").write_text("[]"),
        lambda folder: (folder / "index.json").unlink(),
    ],
)
def test_a_torn_index_is_built_anew(tear, path):
    before = pairs_of(opened(path))
    tear(index_folder(path))
    assert pairs_of(opened(path)) == before
    assert len(np.load(index_folder(path) / "pairs.npy")) == 4


def test_no_object_is_unpickled_from_an_index(path):
    opened(path)
    np.save(index_folder(path) / "pairs.npy", np.array([object()] * 4), allow_pickle=True)
    assert len(opened(path)) == 4


def test_where_nothing_can_be_written_the_index_stays_in_memory(path):
    (path.parent / "cache").write_text("a file where a folder should be")
    said = []
    source = opened(path, say=said.append, in_file_order=True)
    assert len(pairs_of(source)) == 4
    (line,) = said
    assert "the index of pairs cannot be written to" in line
    assert "stays in memory" in line


def test_stored_rows_that_are_torn_or_cannot_be_written_are_made_again(path):
    for number in (0, 1):
        (path.parent / f"{number}.png").write_bytes(file_of(picture(number)))
    manifest = path.parent / "m.jsonl"
    manifest.write_text(json.dumps({"prompt": "p", "chosen": "0.png", "rejected": "1.png"}))
    assert len(opened(manifest, format="manifest")) == 1
    (stored,) = (path.parent / "cache" / "ds_dpo_rows").glob("*.arrow")
    cut(stored)
    assert opened(manifest, format="manifest").read(0).prompt == "p"
    with pa.ipc.open_stream(stored) as stream, pa.ipc.new_stream(str(stored) + ".short", stream.schema):
        pass
    (stored.parent / f"{stored.name}.short").rename(stored)  # a whole file, of no rows
    assert opened(manifest, format="manifest").read(0).prompt == "p"
    shutil.rmtree(path.parent / "cache")
    (path.parent / "cache").write_text("no folder")
    said = []
    assert opened(manifest, format="manifest", say=said.append).read(0).prompt == "p"
    assert ["stays in memory" in line or "stay in memory" in line for line in said] == [True, True]


# ---- the Arrow copy ----


def test_the_copy_to_arrow_is_announced_before_it_is_made_and_only_then(path):
    said = []
    opened(path, say=said.append)
    (line,) = said
    assert "copying parquet to Arrow, once; the copy takes 0.0 MB in" in line
    assert str(path.parent / "cache") in line
    opened(path, say=said.append)
    assert len(said) == 1


def test_a_copy_that_does_not_fit_is_refused_before_it_is_made(path, monkeypatch):
    monkeypatch.setattr(
        "ds_dpo.data.reading.arrow_copy.shutil", SimpleNamespace(disk_usage=lambda place: SimpleNamespace(free=1000))
    )
    with pytest.raises(DataError, match=r"needs 0\.0 MB in .* and 0\.0 MB are free; set data\.cache_dir"):
        opened(path)
    assert list((path.parent / "cache").rglob("*.arrow")) == []
    assert len(opened(path, in_file_order=True)) == 4


def test_what_the_copy_takes_is_foreseen(path):
    Dataset.from_list([row(n, jpg_0=file_of(picture(n, width=64, height=64))) for n in range(300)]).to_parquet(path)
    source = opened(path)
    arrow = sum(file.stat().st_size for file in (path.parent / "cache").rglob("*.arrow"))
    assert len(source) == 300
    copied = uncompressed_bytes(read_footers([path], "a set"), ["caption", "jpg_0", "jpg_1", "label_0"])
    assert arrow < copied * SIZE_MARGIN < 1.1 * arrow


def test_a_torn_copy_is_made_again(path):
    before = pairs_of(opened(path))
    (copy,) = (path.parent / "cache").rglob("*.arrow")
    whole = copy.read_bytes()
    for tear in (lambda: copy.write_bytes(whole[: len(whole) // 2]), copy.unlink, copy.with_suffix(".json").unlink):
        tear()
        assert pairs_of(opened(path)) == before
        assert copy.read_bytes() == whole


def test_a_copy_that_cannot_be_written_is_refused_and_leaves_nothing(path):
    (path.parent / "cache").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"copy in Arrow cannot be written to .*cache/ds_dpo_rows .*data\.cache_dir"):
        opened(path)


def test_what_a_killed_process_left_of_a_copy_is_removed(path):
    opened(path)
    (copy,) = (path.parent / "cache").rglob("*.arrow")
    copy.unlink()
    left = copy.with_name(f".{copy.name}.host.7.partial")
    left.write_bytes(b"half")
    opened(path)
    assert not left.exists()
    assert copy.exists()


def test_rows_of_many_batches_are_found(tmp_path):
    Dataset.from_list([row(n) for n in range(250)]).to_parquet(tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet", max_rows=240)
    assert len(source.reader.read_row(249)) > 0
    order = [239, 0, 99, 100, 199, 200, 1]
    assert [source.read(index).prompt for index in order] == [f"prompt {index}" for index in order]
    assert source.counts["rows"] == 240


# ---- aspect buckets ----


def sized(number, chosen, rejected, **changes):
    """A row whose images have these (height, width)."""
    images = {
        f"jpg_{i}": file_of(picture(2 * number + i, height=size[0], width=size[1]))
        for i, size in enumerate((chosen, rejected))
    }
    return row(number, **(images | changes))


def test_pairs_are_sorted_by_bucket_then_by_file_and_no_bucket_is_empty(tmp_path):
    wide, tall, square = (20, 40), (40, 20), (30, 30)
    content = [
        sized(0, wide, wide),
        sized(1, square, square),
        sized(2, tall, tall),
        sized(3, wide, wide),
        sized(4, wide, tall),  # one and the other: square between them
        sized(5, wide, wide, jpg_0=b"no image"),
    ]
    Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    said = []
    source = opened(
        tmp_path / "a.parquet", say=said.append, aspect_buckets=True, resolution=32, bucket_step=8, max_aspect=2.0
    )
    # of 32 x 32 pixels, sides multiples of 8: 16x64 is too long, 24x40 (1.67) is the widest that max_aspect allows
    assert bucket_shapes(32, step=8, max_aspect=2.0)[0] == (24, 40)
    assert source.bucket_shapes == [(24, 40), (32, 32), (40, 24)]
    assert list(source.bucket_sizes) == [2, 3, 1]
    assert [source.read(n).prompt for n in range(6)] == [f"prompt {n}" for n in (0, 3, 1, 4, 5, 2)]
    assert source.file_order().tolist() == [0, 2, 5, 1, 3, 4]
    assert [source.read(n).prompt for n in source.file_order().tolist()] == [f"prompt {n}" for n in range(6)]
    assert any("reading image sizes for aspect buckets, 0 of 6 pairs" in line for line in said)
    assert source.description.endswith("by height x width 24x40: 2, 32x32: 3, 40x24: 1")
    assert source.fingerprint["buckets"] == "24x40, 32x32, 40x24"


def test_sizes_are_read_once(tmp_path, monkeypatch):
    Dataset.from_list([sized(0, (20, 40), (20, 40))]).to_parquet(tmp_path / "a.parquet")
    fields = {"aspect_buckets": True, "resolution": 64, "bucket_step": 16}
    first = opened(tmp_path / "a.parquet", **fields)
    monkeypatch.setattr(building, "read_size", lambda raw: pytest.fail("sizes were read again"))
    assert opened(tmp_path / "a.parquet", **fields).bucket_shapes == first.bucket_shapes


def test_without_buckets_there_is_one_of_the_training_size(path):
    source = opened(path, resolution=24)
    assert (list(source.bucket_sizes), list(source.bucket_shapes)) == ([4], [(24, 24)])
    assert source.fingerprint["buckets"] == "one"


BUCKETS = {"aspect_buckets": True, "resolution": 32, "bucket_step": 8, "format": "manifest"}
WIDE, SQUARE = (24, 40), (32, 32)


@pytest.fixture
def manifest(tmp_path):
    """Two pairs of image files that are not there yet."""
    (tmp_path / "images").mkdir()
    entries = [{"prompt": str(n), "chosen": f"images/{n}a.png", "rejected": f"images/{n}b.png"} for n in (0, 1)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return tmp_path / "m.jsonl"


def put(manifest, size, *numbers):
    for number in numbers:
        for side in "ab":
            image = picture(number, height=size[0], width=size[1])
            (manifest.parent / "images" / f"{number}{side}.png").write_bytes(file_of(image))


def buckets_of(manifest, say=lambda line: None):
    source = opened(manifest, say=say, **BUCKETS)
    return dict(zip(source.bucket_shapes, source.bucket_sizes, strict=True))


def test_buckets_follow_images_that_come_later_are_replaced_or_removed(manifest):
    assert buckets_of(manifest) == {SQUARE: 2}
    put(manifest, (20, 40), 0, 1)
    said = []
    assert buckets_of(manifest, said.append) == {WIDE: 2}
    # of a pair without its first image, the second was not looked for
    assert "image sizes are read again: 2 images changed since, the first is images/0a.png" in said
    put(manifest, (30, 30), 1)
    assert buckets_of(manifest) == {WIDE: 1, SQUARE: 1}
    for path in (manifest.parent / "images").glob("0*.png"):
        path.unlink()
    assert buckets_of(manifest) == {SQUARE: 2}


def test_sizes_of_images_that_stayed_are_not_read_again(manifest, monkeypatch):
    put(manifest, (20, 40), 0)
    (manifest.parent / "images" / "1a.png").write_bytes(b"torn")  # whatever is in it, it stays
    first = buckets_of(manifest)
    monkeypatch.setattr(building, "read_size", lambda raw: pytest.fail("sizes were read again"))
    assert buckets_of(manifest) == first == {WIDE: 1, SQUARE: 1}


def test_an_index_is_not_kept_while_a_disk_does_not_answer(manifest, monkeypatch):
    put(manifest, (20, 40), 0, 1)

    def unanswered(path, **options):
        raise OSError(errno.EIO, "Input/output error")

    said = []
    with monkeypatch.context() as patched:
        patched.setattr(image_files, "read_regular", unanswered)
        assert buckets_of(manifest, said.append) == {SQUARE: 2}
    assert any("2 pairs have sizes that cannot be read now, so the next start reads all again" in line for line in said)
    assert buckets_of(manifest) == {WIDE: 2}
