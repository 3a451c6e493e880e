"""Bad files, columns, labels and rows: each has one outcome. What is wrong with a whole file or column is an error at
the start; what is wrong with one row makes that row a bad one, which the loader counts and replaces.
"""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from pair_files import config, file_of, picture, row

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.source import BadRowError
from ds_dpo.errors import DataError

IMAGE = file_of(picture())


def opened(dataset, tmp_path, *, in_file_order=False, **fields):
    data = config(dataset, cache_dir=str(tmp_path / "cache"), **fields)
    return open_source(data, say=lambda line: None, in_file_order=in_file_order)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*entries):
    return "\n".join(map(json.dumps, entries))


PAIR = {"prompt": "p", "chosen": "0.png", "rejected": "0.png"}
RANKED = {"prompt": "p", "images": ["0.png", "0.png"], "rank": [1, 2]}
LABELLED = {"text": "p", "image": "0.png", "image2": "0.png", "label_0": 1}

# name of the file, what is in it, format, what the error says
BAD_TEXT_FILES = {
    "an empty file": ("m.jsonl", "", "manifest", "m.jsonl has no rows"),
    "blank lines only": ("m.jsonl", "\n \n", "manifest", "m.jsonl has no rows"),
    "a line cut short": ("m.jsonl", lines(PAIR) + '\n{"prompt": "p', "manifest", "line 2 is not JSON"),
    "a list cut short": ("m.json", json.dumps([PAIR])[:-9], "manifest", "m.json is not a JSON list"),
    "entries that are no objects": ("m.json", "[[1, 2]]", "manifest", "entry 0 is list; an object of columns"),
    "lines that are no objects": ("m.jsonl", lines(PAIR, 7), "manifest", "line 2 is int; an object of columns"),
    "another encoding": ("m.jsonl", lines(PAIR).encode() + b"\n\xff\xfe", "manifest", "line 2 is not UTF-8 text"),
    "a header of another encoding": (
        "m.csv",
        "prompt,chosen,rejected".encode("utf-16"),
        "manifest",
        "line 1 is not UTF-8",
    ),
    "base64 in CSV": (
        *("m.csv", "prompt,chosen,rejected\np,a.png,b.png\np," + "iVBORw0K" * 20_000 + ",b.png\n", "manifest"),
        "line 3 has a value of more than 131072 characters, such as an image in base64; a text, or the path of",
    ),
    "a bomb of brackets": ("m.jsonl", "\n" + '{"a":' + "[" * 200_000, "manifest", "line 2 is not JSON"),
    "a number of too many digits": ("m.jsonl", '{"a": ' + "9" * 5000 + "}", "manifest", "line 1 is not JSON"),
    "a column missing": (
        "m.jsonl",
        lines({"prompt": "p", "chosen": "a"}),
        "manifest",
        "has no column rejected; it has",
    ),
    "a CSV row of other length": ("m.csv", "prompt,chosen,rejected\np,a\n", "manifest", "line 2 has 2 values, but the"),
    "a CSV column twice": ("m.csv", "prompt,chosen,chosen\np,a,b\n", "manifest", "has a column twice"),
    "a CSV quote without end": ("m.csv", 'prompt,chosen,rejected\n"p,a,b\n', "manifest", "line 2 is not CSV"),
    "a CSV label of text": (
        "m.csv",
        "text,image,image2,label_0\np,a,b,left\n",
        "manifest",
        "label_0 is 'left'; a number",
    ),
    "a JSON label of text": ("m.jsonl", lines(LABELLED | {"label_0": "1"}), "manifest", "label_0 is '1'; a number"),
    "a label out of range": (
        "m.jsonl",
        lines(LABELLED, LABELLED | {"label_0": 7}),
        "manifest",
        "label_0 is 7 in row 1",
    ),
    "a confidence of text": ("m.jsonl", lines(PAIR | {"confidence": "high"}), "manifest", "confidence is 'high'"),
    "a number beyond floats": ("m.jsonl", lines(PAIR | {"confidence": 10**400}), "manifest", "number of 401 digits"),
    "ranks that are no list": ("m.jsonl", lines(RANKED | {"rank": 1}), "ranked", "rank is int; a list, one value for"),
    "no ranks": ("m.jsonl", lines(RANKED, RANKED | {"rank": None}), "ranked", "rank is null in row 1"),
    "a rank of text": ("m.jsonl", lines(RANKED | {"rank": [1, "2"]}), "ranked", "rank is '2'; a number would fit"),
    "a null rank": ("m.jsonl", lines(RANKED, RANKED | {"rank": [1, None]}), "ranked", "rank has a null in row 1"),
    "images without a group": (
        "m.jsonl",
        lines({"prompt": "p", "image": "0.png", "rank": 1}),
        "ranked",
        "no column says which images belong together",
    ),
    "no group in a row": (
        "m.jsonl",
        lines(*({"prompt": "p", "image": "0.png", "rank": 1, "prompt_id": group} for group in ("a", None))),
        "ranked",
        "the group is null in row 1",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXT_FILES)
def test_a_bad_text_file_is_refused(case, tmp_path):
    name, content, format_, message = BAD_TEXT_FILES[case]
    path = written(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        opened(path, tmp_path, format=format_)
    assert message in str(caught.value)
    assert [each for each in tmp_path.rglob(".*")] == []  # nothing half-written


# entry, settings, what the bad row's reason says
BAD_ROWS = {
    "a prompt that is null": (PAIR | {"prompt": None}, "prompt: NoneType instead of text"),
    "a prompt that is a number": (PAIR | {"prompt": 3}, "prompt: int instead of text"),
    "a prompt that is a list": (PAIR | {"prompt": ["a", "b"]}, "prompt: list instead of text"),
    "a prompt that is half a character": (PAIR | {"prompt": "\ud83d"}, "prompt: text with half of a surrogate pair"),
    "an image that is an object": (
        PAIR | {"chosen": {"bytes": None, "path": "0.png"}},
        "chosen: dict instead of a path",
    ),
    "an image that is a number": (PAIR | {"rejected": 1.5}, "rejected: float instead of a path"),
    "an image as base64": (PAIR | {"rejected": "/9j/" + "A" * 5000}, "it looks like base64; the path of an image"),
    "an image as an address of data": (PAIR | {"rejected": "data:image/png;base64,iVBO"}, "it looks like base64"),
    "an image on the web": (PAIR | {"rejected": "https://x.org/0.png"}, "it looks like an address; download the"),
    "no chosen image": ({key: PAIR[key] for key in ("prompt", "rejected")}, "chosen: missing: the row has null"),
    "a file that is not there": (PAIR | {"rejected": "1.png"}, "rejected: path '1.png': there is no file"),
    "a folder": (PAIR | {"rejected": "sub"}, "rejected: path 'sub': there is no file"),
    "an empty path": (PAIR | {"rejected": ""}, "rejected: path '': there is no file"),
    "a path out of the folder": (PAIR | {"rejected": "../secret.png"}, "rejected: path '../secret.png' leads out of"),
    "a path from the root": (PAIR | {"rejected": "/etc/passwd"}, "rejected: path '/etc/passwd' leads out of"),
    "a device": (PAIR | {"rejected": "/dev/zero"}, "rejected: path '/dev/zero' leads out of"),
    "a path with a null byte": (PAIR | {"rejected": "0\0.png"}, "leads out of"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_when_it_is_read_and_leaves_the_others(case, tmp_path):
    entry, reason = BAD_ROWS[case]
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    written(folder / "0.png", IMAGE)
    written(tmp_path / "secret.png", IMAGE)
    path = written(folder / "m.jsonl", lines(PAIR, entry))
    source = opened(path, tmp_path, format="manifest")
    assert source.read(0).chosen == IMAGE
    with pytest.raises(BadRowError) as caught:
        source.read(1)
    assert caught.value.bad_row.uid == f"row 1 of {path}, split train"
    assert reason in caught.value.bad_row.reason
    assert len(caught.value.bad_row.reason) < 600


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.jsonl", lines(PAIR, PAIR | {"prompt": "caf?"}, PAIR)),
        ("m.json", json.dumps([PAIR, PAIR | {"prompt": "caf?"}, PAIR])),
        ("m.csv", "prompt,chosen,rejected\np,0.png,0.png\ncaf?,0.png,0.png\np,0.png,0.png\n"),
    ],
)
def test_a_value_that_is_not_utf8_makes_a_bad_row_and_leaves_the_others(tmp_path, name, content):
    written(tmp_path / "0.png", IMAGE)
    path = written(tmp_path / name, content.encode().replace(b"?", b"\xe9"))  # Latin-1
    source = opened(path, tmp_path, format="manifest")
    assert [source.read(row).prompt for row in (0, 2)] == ["p", "p"]
    with pytest.raises(BadRowError, match="prompt: text that is not UTF-8: byte 0xe9"):
        source.read(1)


def test_image_root_allows_what_lies_below_it(tmp_path):
    (tmp_path / "set").mkdir()
    written(tmp_path / "0.png", IMAGE)
    entries = [PAIR | {"chosen": str(tmp_path / "0.png"), "rejected": "set/../0.png"}]
    path = written(tmp_path / "set" / "m.jsonl", lines(*entries))
    assert opened(path, tmp_path, format="manifest", image_root=str(tmp_path)).read(0).chosen == IMAGE


def test_a_device_below_image_root_is_no_image(tmp_path):
    path = written(tmp_path / "m.jsonl", lines(PAIR | {"chosen": "/dev/zero"}))
    with pytest.raises(BadRowError, match="there is no file /dev/zero"):
        opened(path, tmp_path, format="manifest", image_root="/").read(0)


def test_a_ranking_with_fewer_images_than_ranks_is_a_bad_row(tmp_path):
    written(tmp_path / "0.png", IMAGE)
    path = written(tmp_path / "m.jsonl", lines(RANKED | {"images": ["0.png"]}))
    with pytest.raises(BadRowError, match="has 1 images, and rank has 2 values"):
        opened(path, tmp_path, format="ranked").read(0)


# ---- columns ----

BAD_COLUMNS = {
    "another form": ("caption", "data.columns has 'caption'; role=column would fit"),
    "an unknown role": ("captoin=text", "format pickapic has no role captoin; it has prompt, image_0"),
    "an unknown column": ("prompt=text", "data.columns has prompt=text; its columns are caption, jpg_0"),
    "an image of numbers": (
        "image_0=ranking_id",
        "ranking_id is int64; image bytes, {bytes, path} or a path would fit",
    ),
    "a label of text": ("label=caption", "caption is string; a number or bool would fit: 1, 0, or 0.5 for a tie"),
    "a prompt of bytes": ("prompt=jpg_0", "jpg_0 is binary; text would fit"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
@pytest.mark.parametrize("in_file_order", [False, True])
def test_a_bad_column_is_refused_with_what_there_is(case, in_file_order, tmp_path):
    entry, message = BAD_COLUMNS[case]
    Dataset.from_list([row(0)]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "a.parquet", tmp_path, in_file_order=in_file_order, columns=[entry])
    assert message in str(caught.value)


def test_a_role_given_twice_or_not_read_is_refused(tmp_path):
    path = written(tmp_path / "m.jsonl", lines(PAIR | {"won": 1}))
    with pytest.raises(DataError, match="gives role prompt twice: a and b"):
        opened(path, tmp_path, format="manifest", columns=["prompt=a", "prompt=b"])
    with pytest.raises(DataError, match="label=won, which is not read together with prompt, chosen, rejected"):
        opened(path, tmp_path, format="manifest", columns=["label=won", "chosen=chosen"])


# ---- files ----


def test_a_row_group_that_is_torn_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    content = [row(n, jpg_0=bytes([n]) * 50_000) for n in range(4)]
    pq.write_table(pa.Table.from_pylist(content), path, row_group_size=2, compression="none", use_dictionary=False)
    source = opened(path, tmp_path, in_file_order=True)
    column = pq.read_metadata(path).row_group(1).column(1)
    assert column.path_in_schema == "jpg_0"
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * 64)
    assert source.read(1).prompt == "prompt 1"
    with pytest.raises(DataError, match=r"a\.parquet: row group 1 cannot be read"):
        source.read(2)


@pytest.mark.parametrize("in_file_order", [False, True])
def test_a_parquet_file_cut_short_is_refused(in_file_order, tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_list([row(0)]).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        opened(path, tmp_path, in_file_order=in_file_order)


def test_a_manifest_on_the_hub_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match="hf download MizzenAI/HPDv3 --repo-type dataset --local-dir FOLDER"):
        opened("MizzenAI/HPDv3", tmp_path, format="manifest")


def test_a_split_there_in_two_kinds_is_refused(tmp_path):
    written(tmp_path / "train.json", json.dumps([PAIR]))
    written(tmp_path / "train.csv", "prompt,chosen,rejected\n")
    with pytest.raises(DataError, match=r"split train exists as \.csv and \.json; give one file"):
        opened(tmp_path, tmp_path, format="manifest")


# ---- tars ----


def tar_of(path, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


SAMPLE = [("a.chosen.png", IMAGE), ("a.rejected.png", IMAGE), ("a.txt", b"p")]
OTHER = [(name.replace("a.", "b.", 1), content) for name, content in SAMPLE]
BAD_TARS = {
    "a member twice": ([*SAMPLE, SAMPLE[2]], "has member a.txt twice"),
    "a sample in two places": ([*SAMPLE, *OTHER, ("a.json", b"{}")], "members of sample a are not next to each other"),
    "no images": ([("a.txt", b"p")], "has no column"),
    "no members": ([], "has no column"),
    "a label of text": ([("a.jpg_0.jpg", IMAGE), ("a.jpg_1.jpg", IMAGE), ("a.label_0.txt", b"left")], "is 'left'; a"),
    "JSON cut short": ([*SAMPLE, ("a.json", b'{"prompt')], "a.json is not JSON"),
    "JSON that is no object": ([*SAMPLE, ("a.json", b"[1]")], "a.json is list; an object would fit"),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_a_bad_tar_is_refused(case, tmp_path):
    members, message = BAD_TARS[case]
    with pytest.raises(DataError) as caught:
        opened(tar_of(tmp_path / "a.tar", *members), tmp_path, format="webdataset")
    assert message in str(caught.value)


def test_a_tar_cut_at_any_block_is_refused(tmp_path):
    whole = tar_of(tmp_path / "whole.tar", *SAMPLE, *OTHER).read_bytes()
    content_end = whole.rstrip(b"\0")
    path = tmp_path / "a.tar"
    for length in range(512, len(content_end), 512):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut short or torn at byte|cannot be read as an uncompressed tar"):
            opened(path, tmp_path, format="webdataset")


def test_a_torn_header_a_compressed_tar_and_two_in_one_are_refused(tmp_path):
    path = tar_of(tmp_path / "a.tar", *SAMPLE, *OTHER)
    whole = path.read_bytes()
    torn = whole.index(b"b.chosen.png")
    written(tmp_path / "torn.tar", whole[:torn] + b"\xff" * 200 + whole[torn + 200 :])
    tar_of(tmp_path / "packed.tar", *SAMPLE, mode="w:gz")
    written(tmp_path / "two.tar", whole + bytes(2**20) + whole)
    written(tmp_path / "small.tar", whole + whole)
    for name, message in (
        ("torn", "is cut short or torn at byte"),
        ("packed", "cannot be read as an uncompressed tar"),
        ("two", "has another archive after its end"),
        ("small", "has another archive after its end"),
    ):
        with pytest.raises(DataError, match=message):
            opened(tmp_path / f"{name}.tar", tmp_path, format="webdataset")


def test_a_member_that_one_sample_lacks_makes_it_a_bad_row_or_a_tie(tmp_path):
    parts = {"jpg_0.jpg": IMAGE, "jpg_1.jpg": IMAGE, "label_0.txt": b"1", "txt": b"p"}
    members = [(f"{key}.{ending}", content) for key in "abc" for ending, content in parts.items()]
    lacking = ("a.txt", "b.label_0.txt", "c.jpg_1.jpg")
    path = tar_of(tmp_path / "a.tar", *(member for member in members if member[0] not in lacking))
    source = opened(path, tmp_path, format="webdataset")
    assert (source.counts["rows"], source.counts["ties"], source.counts["pairs"]) == (3, 1, 2)
    with pytest.raises(BadRowError, match="prompt: NoneType instead of text"):
        source.read(0)
    with pytest.raises(BadRowError, match="image_1: missing"):
        source.read(1)


def test_a_tar_cut_after_it_was_indexed_makes_bad_rows(tmp_path):
    path = tar_of(tmp_path / "a.tar", *SAMPLE)
    source = opened(path, tmp_path, format="webdataset")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadRowError, match=r"chosen: .*a\.tar at byte 512: 88 of [0-9]+ bytes are there"):
        source.read(0)


def test_an_ending_that_no_sample_has_is_refused_with_those_there_are(tmp_path):
    path = tar_of(tmp_path / "a.tar", *SAMPLE)
    with pytest.raises(DataError, match=r"prompt=caption\.md; endings of members are chosen\.png, rejected\.png, txt"):
        opened(path, tmp_path, format="webdataset", columns=["prompt=caption.md"])
