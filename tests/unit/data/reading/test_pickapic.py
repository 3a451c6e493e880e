"""Pick-a-Pic's columns from wherever they lie, and every way in which a dataset can be the wrong one."""

from fnmatch import fnmatch

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from pair_files import config, file_of, picture, row

from ds_dpo.data.images import decode_rgb
from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.reading import split_files as open_dataset
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.source import BadRowError
from ds_dpo.errors import DataError

LABELS = [1.0, 0.5, 0.0, 0.5, 1.0]


def rows(labels=LABELS):
    return [row(number, label_0=label) for number, label in enumerate(labels)]


def write(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows() if content is None else content).to_parquet(path)
    return path


def opened(tmp_path, dataset, say=print, in_file_order=False, **fields):
    data = config(dataset, cache_dir=str(tmp_path / "cache"), **fields)
    return open_source(data, say=say, in_file_order=in_file_order)


def refusal(tmp_path, dataset, **fields):
    with pytest.raises(DataError) as caught:
        opened(tmp_path, dataset, **fields)
    return str(caught.value)


# ---- where it lies ----


def as_file(tmp_path):
    return write(tmp_path / "any [name]*.parquet")


def as_hub_layout(tmp_path):
    content = rows()
    write(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", content[:3])
    write(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", content[3:])
    write(tmp_path / "set" / "data" / "validation_unique-00000-of-00001.parquet", content[:1])
    (tmp_path / "set" / "README.md").write_text("a card")
    return tmp_path / "set"


def as_file_of_its_split(tmp_path):
    write(tmp_path / "set" / "train.parquet")
    write(tmp_path / "set" / "train_unique.parquet", rows([1.0]))
    write(tmp_path / "set" / ".cache" / "train.parquet", rows([1.0]))
    return tmp_path / "set"


def as_folder_of_its_split(tmp_path):
    write(tmp_path / "set" / "train" / "0000.parquet")
    return tmp_path / "set"


def as_saved_dataset(tmp_path):
    Dataset.from_list(rows()).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def as_saved_splits(tmp_path):
    DatasetDict(train=Dataset.from_list(rows()), test=Dataset.from_list(rows([1.0]))).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


LAYOUTS = [as_file, as_hub_layout, as_file_of_its_split, as_folder_of_its_split, as_saved_dataset, as_saved_splits]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pairs(layout, tmp_path):
    source = opened(tmp_path, layout(tmp_path))
    assert len(source) == 3
    assert source.description.endswith("split train: 5 rows, 2 ties left out, 3 pairs of 3 prompts")
    first, second = source.read(0), source.read(1)
    assert (first.prompt, second.prompt) == ("prompt 0", "prompt 2")
    assert (first.chosen, first.rejected) == (file_of(picture(0)), file_of(picture(1)))
    assert (second.chosen, second.rejected) == (file_of(picture(5)), file_of(picture(4)))  # label_0 = 0: image 1 won


def test_the_miniature_s_name_is_found_in_the_package(tmp_path, monkeypatch):
    write(tmp_path / "assets" / "pairs" / "train.parquet")
    monkeypatch.setattr("ds_dpo.config.asset_paths.PACKAGE", tmp_path)
    assert len(opened(tmp_path, "ds_dpo://assets/pairs")) == 3


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    folder = as_hub_layout(tmp_path)
    assert "has no split test; it has train, validation_unique" in refusal(tmp_path, folder, split="test")
    as_saved_splits(tmp_path / "saved")
    assert "has no split val; it has test, train" in refusal(tmp_path, tmp_path / "saved" / "set", split="val")


def test_a_copy_cut_short_is_refused(tmp_path):
    folder = as_hub_layout(tmp_path)
    (folder / "data" / "train-00000-of-00002.parquet").unlink()
    assert "1 of 2 files are missing, the first is train-00000-of-00002.parquet" in refusal(tmp_path, folder)


def test_the_same_split_in_two_folders_is_ambiguous(tmp_path):
    for name in ("v1", "v2"):
        write(tmp_path / "set" / name / "train-00000-of-00001.parquet")
    assert "are in" in (message := refusal(tmp_path, tmp_path / "set"))
    assert "v1" in message
    assert "v2" in message


def test_what_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pairs.csv").write_text("caption\n")
    (tmp_path / "broken.parquet").write_bytes(b"nonsense")
    cut_short = write(tmp_path / "cut.parquet")
    cut_short.write_bytes(cut_short.read_bytes()[:-20])
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    assert "no .parquet file" in refusal(tmp_path, tmp_path / "empty")
    assert "needs a .parquet file" in refusal(tmp_path, tmp_path / "pairs.csv")
    assert "cannot be read as parquet: Parquet magic bytes" in refusal(tmp_path, tmp_path / "broken.parquet")
    assert "cannot be read as parquet" in refusal(tmp_path, cut_short)
    assert "save_to_disk folder, cannot be read" in refusal(tmp_path, tmp_path / "saved")
    assert "there is no such file or folder" in refusal(tmp_path, tmp_path / "gone")
    assert "there is no such file or folder" in refusal(tmp_path, "./gone")
    assert "there is no such file or folder" in refusal(tmp_path, "gone")


# ---- the hub ----


class FakeHub:
    """Stands in for snapshot_download: a repository as a folder, of which patterns are copied to a cache."""

    def __init__(self, folder, cache):
        self.folder, self.cache, self.asked, self.lists = folder, cache, [], True

    def __call__(self, name, *, repo_type, revision, allow_patterns, cache_dir, dry_run):
        assert (name, repo_type) == ("someone/pairs", "dataset")
        self.asked.append((allow_patterns, str(cache_dir), revision))
        found = [path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        matching = [path for path in found if any(fnmatch(path.as_posix(), each) for each in allow_patterns)]
        if dry_run and not self.lists:
            raise ConnectionError("Dry run cannot be performed")
        if dry_run:
            return [type("File", (), {"filename": str(path)}) for path in matching]
        for path in matching:
            (self.cache / path).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / path).write_bytes((self.folder / path).read_bytes())
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(as_hub_layout(tmp_path), tmp_path / "snapshot")
    monkeypatch.setattr(open_dataset, "snapshot_download", fake)
    return fake


def test_a_hub_dataset_downloads_only_its_split(hub, tmp_path):
    assert len(opened(tmp_path, "someone/pairs", split="validation_unique")) == 1
    name = "data/validation_unique-00000-of-00001.parquet"
    assert [patterns for patterns, _, _ in hub.asked] == [["*.parquet"], [name, "README.md"]]
    assert {(cache, revision) for _, cache, revision in hub.asked} == {(str(tmp_path / "cache" / "hub"), None)}
    assert [path.name for path in hub.cache.rglob("*.parquet")] == ["validation_unique-00000-of-00001.parquet"]


def test_the_commit_of_a_hub_dataset_is_known(hub, tmp_path):
    assert opened(tmp_path, "someone/pairs", split="validation_unique").commit is None
    hub.cache = tmp_path / "snapshots" / ("1a" * 20)
    found = opened(tmp_path, "someone/pairs", split="train")
    assert found.commit == "1a" * 20
    assert opened(tmp_path, str(hub.cache), split="train").commit is None


def test_a_hub_dataset_without_the_split_names_those_there_are_and_downloads_nothing(hub, tmp_path):
    assert "has no split test; it has train, validation_unique" in refusal(tmp_path, "someone/pairs", split="test")
    (hub.folder / "data" / "train-00000-of-00002.parquet").unlink()
    assert "1 of 2 files are missing" in refusal(tmp_path, "someone/pairs")
    assert "matches no file of data.dataset" in refusal(tmp_path, "someone/pairs", files=["part-*.parquet"])
    assert list(hub.cache.rglob("*.parquet")) == []


def test_a_hub_dataset_downloads_what_patterns_name(hub, tmp_path):
    write(hub.folder / "part-0[a].parquet", rows([1.0]))
    assert len(opened(tmp_path, "someone/pairs", files=["part-*.parquet"])) == 1
    assert [path.name for path in hub.cache.rglob("*.parquet")] == ["part-0[a].parquet"]


def test_a_hub_out_of_reach_gives_what_it_gave_earlier(hub, tmp_path):
    assert len(opened(tmp_path, "someone/pairs")) == 3
    hub.lists = False
    assert len(opened(tmp_path, "someone/pairs")) == 3
    assert hub.asked[-1][0] == ["*train*.parquet", "README.md"]


def test_pickapic_s_own_names_are_known_before_anything_is_downloaded(hub, tmp_path):
    for number, digits in enumerate(("b66ac786bf6fb553", "0123456789012345")):
        write(hub.folder / "data" / f"test_unique-0000{number}-of-00002-{digits}.parquet", rows([1.0]))
        write(hub.folder / "data" / f"test-0000{number}-of-00003-{digits}.parquet", rows([1.0, 0.0]))
    assert len(opened(tmp_path, "someone/pairs", split="test_unique")) == 2
    assert "1 of 3 files are missing, the first is test-00002-of-00003" in refusal(
        tmp_path, "someone/pairs", split="test"
    )
    assert {path.name.split("-")[0] for path in hub.cache.rglob("*.parquet")} == {"test_unique"}


def test_a_hub_dataset_whose_files_are_only_numbered_is_found(hub, tmp_path):
    write(hub.folder / "0000.parquet")
    (hub.folder / "data" / "train-00000-of-00002.parquet").unlink()
    (hub.folder / "data" / "train-00001-of-00002.parquet").unlink()
    assert len(opened(tmp_path, "someone/pairs", revision="refs/pr/1")) == 3
    assert [patterns for patterns, _, _ in hub.asked][-1] == ["0000.parquet", "README.md"]
    assert {revision for _, _, revision in hub.asked} == {"refs/pr/1"}


def test_a_subset_of_a_hub_dataset_downloads_nothing_of_the_others(hub, tmp_path):
    write(hub.folder / "small" / "train-00000-of-00001.parquet", rows([1.0]))
    assert len(opened(tmp_path, "someone/pairs", name="small")) == 1
    (hub.folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: both\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )
    for each in hub.cache.rglob("*.parquet"):
        each.unlink()
    assert len(opened(tmp_path, "someone/pairs", name="both")) == 3
    assert sorted(each.parent.name for each in hub.cache.rglob("*.parquet")) == ["data", "data"]
    assert "subset none, has no split train" in refusal(tmp_path, "someone/pairs", name="none")


def test_a_hub_out_of_reach_is_one_sentence(tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("[Errno -2] Name or service not known\nsecond line")

    monkeypatch.setattr(open_dataset, "snapshot_download", unreachable)
    message = refusal(tmp_path, "someone/pairs")
    assert message.endswith(
        "from the hub: ConnectionError: [Errno -2] Name or service not known second line; or give a local folder"
    )
    assert "\n" not in message


# ---- labels ----


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        ([1, 0, 1], [0, 3, 4]),
        ([True, False, None], [0, 3]),
        ([1.0, float("nan"), 0.0], [0, 5]),
        ([None, 0.5, 1.0], [4]),
    ],
)
def test_labels_may_be_int_bool_or_float_and_nobody_s_win_is_a_tie(labels, chosen, tmp_path):
    source = opened(tmp_path, write(tmp_path / "a.parquet", rows(labels)))
    assert [source.read(index).chosen for index in range(len(source))] == [file_of(picture(each)) for each in chosen]


def test_ties_are_an_error_where_asked(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert "2 of 5 rows are ties, the first is row 1" in refusal(tmp_path, path, ties="error")
    assert len(opened(tmp_path, write(tmp_path / "b.parquet", rows([1.0, 0.0])), ties="error")) == 2


def test_labels_that_say_nothing_are_refused(tmp_path):
    other = write(tmp_path / "a.parquet", rows([1.0, 0.7, 0.0, -1.0]))
    assert "label_0 is 0.7 in row 1; 2 rows have no usable label" in refusal(tmp_path, other)
    text = write(tmp_path / "b.parquet", rows(["1", "0"]))
    assert "label_0 is string" in refusal(tmp_path, text)
    assert "0 pairs of 0 prompts; no pair is left to train on" in refusal(
        tmp_path, write(tmp_path / "c.parquet", rows([0.5]))
    )


def test_has_label_is_not_looked_at(tmp_path):
    content = [row(0, has_label=False), row(1, has_label=True)]
    assert len(opened(tmp_path, write(tmp_path / "a.parquet", content))) == 2


def test_another_number_of_pairs_than_expected_is_warned_of_with_both(tmp_path):
    path, said = write(tmp_path / "a.parquet"), []
    assert len(opened(tmp_path, path, say=said.append, expected_pairs=4)) == 3
    assert said[-1] == f"warning: {path}, split train: 3 pairs, but data.expected_pairs is 4"
    assert len(opened(tmp_path, path, say=said.append, expected_pairs=3)) == 3
    assert said[-1] == f"{path}, split train: 3 pairs, as expected"


# ---- columns and rows ----


def test_a_missing_column_is_named_beside_those_there_are(tmp_path):
    content = [{"caption": "a", "image": b"x", "label_0": 1.0}]
    message = refusal(tmp_path, write(tmp_path / "a.parquet", content))
    assert "has no column jpg_0, jpg_1; it has caption, image, label_0" in message


@pytest.mark.parametrize("form", ["struct", "feature"])
def test_images_may_be_dicts_or_the_image_feature(form, tmp_path):
    content = [
        row(n, **{f"jpg_{i}": {"bytes": file_of(picture(2 * n + i)), "path": None} for i in (0, 1)}) for n in (0, 1)
    ]
    dataset = Dataset.from_list(content)
    if form == "feature":
        for column in ("jpg_0", "jpg_1"):
            dataset = dataset.cast_column(column, ImageFeature())
    dataset.to_parquet(tmp_path / "a.parquet")
    record = opened(tmp_path, tmp_path / "a.parquet").read(1)
    assert np.array_equal(np.asarray(decode_rgb(record.chosen)), np.asarray(picture(2)))
    assert np.array_equal(np.asarray(decode_rgb(record.rejected)), np.asarray(picture(3)))


def test_a_torn_image_feature_does_not_fail_before_it_is_decoded(tmp_path):
    dataset = Dataset.from_list(
        [row(0, jpg_0={"bytes": b"torn", "path": None}, jpg_1={"bytes": b"torn", "path": None})]
    )
    dataset.cast_column("jpg_0", ImageFeature()).cast_column("jpg_1", ImageFeature()).to_parquet(tmp_path / "a.parquet")
    assert opened(tmp_path, tmp_path / "a.parquet").read(0).chosen["bytes"] == b"torn"


def test_a_caption_that_is_no_text_is_a_bad_row(tmp_path):
    source = opened(tmp_path, write(tmp_path / "a.parquet", [row(0), row(1, caption=None)]))
    with pytest.raises(BadRowError, match=r"row 1 of .*ranking_id 101\): caption: NoneType instead of text"):
        source.read(1)


def test_a_null_image_is_a_bad_row(tmp_path):
    features = Features(
        {"caption": Value("string"), "jpg_0": Value("binary"), "jpg_1": Value("binary"), "label_0": Value("int8")}
    )
    content = [{"caption": "a", "jpg_0": None, "jpg_1": file_of(picture()), "label_0": 1}]
    Dataset.from_list(content, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(BadRowError, match=r"row 0 of .*jpg_0: missing: the row has null instead of an image"):
        opened(tmp_path, tmp_path / "a.parquet").read(0)


# ---- pair ids ----


def test_a_pair_s_id_is_its_row_s_own_wherever_the_row_lies(tmp_path):
    whole = opened(tmp_path, write(tmp_path / "a.parquet"))
    moved = opened(tmp_path, write(tmp_path / "b.parquet", list(reversed(rows()))), split="other")
    ids = [whole.read(index).pair_id for index in range(3)]
    assert ids == [moved.read(index).pair_id for index in (2, 1, 0)]
    assert ids == [id_of(f"{100 + n} left-{n} right-{n}") for n in (0, 2, 4)]
    assert len(set(ids)) == 3


def test_without_an_id_of_its_own_a_pair_is_its_source_and_unfiltered_row(tmp_path):
    content = [{key: value for key, value in each.items() if key != "image_0_uid"} for each in rows()]
    path = write(tmp_path / "a.parquet", content)
    source = opened(tmp_path, path)
    assert [source.read(index).pair_id for index in range(3)] == [
        id_of(f"row {row_number} of {path}, split train") for row_number in (0, 2, 4)
    ]
    partly = opened(tmp_path, write(tmp_path / "b.parquet", [row(0), row(1, ranking_id=None)]))
    assert partly.read(0).pair_id == id_of("100 left-0 right-0")
    assert partly.read(1).pair_id == id_of(f"row 1 of {tmp_path / 'b.parquet'}, split train")
