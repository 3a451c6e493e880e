"""Every format from real files: the same pairs in the same order by random access and straight from the files."""

import csv
import io
import json
import os
import tarfile

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from pair_files import config, file_of, picture, row

from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.reading.open_source import open_source


def image(number):
    return file_of(picture(number))


def opened(tmp_path, dataset, *, say=lambda line: None, in_file_order=False, **fields):
    return open_source(
        config(dataset, **({"cache_dir": str(tmp_path / "cache")} | fields)), say=say, in_file_order=in_file_order
    )


def pairs_of(source):
    """(prompt, chosen, rejected) of each, images as their bytes."""

    def bytes_of(raw):
        return raw if isinstance(raw, bytes) else raw["bytes"]

    records = [source.read(index) for index in range(len(source))]
    return [(record.prompt, bytes_of(record.chosen), bytes_of(record.rejected)) for record in records]


def write_images(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(image(number))


# ---- one writer a format: returns what to open, its settings, and the pairs by hand ----


def pickapic(tmp_path):
    labels = [1.0, 0.5, 0.0, None, 1.0]
    Dataset.from_list([row(n, label_0=label) for n, label in enumerate(labels)]).to_parquet(
        tmp_path / "a.parquet", batch_size=2
    )
    pairs = [("prompt 0", 0, 1), ("prompt 2", 5, 4), ("prompt 4", 8, 9)]
    return tmp_path / "a.parquet", {}, pairs


def pickapic_renamed(tmp_path):
    names = {"caption": "text", "jpg_0": "left", "jpg_1": "right", "label_0": "is_left_better"}
    content = [
        {names.get(key, key): value for key, value in row(n, label_0=label).items()}
        for n, label in enumerate([True, False])
    ]
    Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    columns = ["prompt=text", "image_0=left", "image_1=right", "label=is_left_better"]
    return tmp_path / "a.parquet", {"columns": columns}, [("prompt 0", 0, 1), ("prompt 1", 3, 2)]


def chosen_rejected(tmp_path):
    # as data-is-better-together/open-image-preferences-v1-binarized
    content = [{"prompt": f"prompt {n}", "chosen": picture(2 * n), "rejected": picture(2 * n + 1)} for n in range(3)]
    features = Features({"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()})
    Dataset.from_list(content, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    return tmp_path, {"format": "chosen_rejected"}, [(f"prompt {n}", 2 * n, 2 * n + 1) for n in range(3)]


def chosen_rejected_saved(tmp_path):
    chosen_rejected(tmp_path / "parquet")
    dataset = Dataset.from_parquet(str(tmp_path / "parquet" / "train-00000-of-00001.parquet"))
    dataset.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved", {"format": "chosen_rejected"}, [(f"prompt {n}", 2 * n, 2 * n + 1) for n in range(3)]


def ranked_parquet(tmp_path):
    features = Features({"prompt": Value("string"), "images": List(ImageFeature()), "scores": List(Value("float32"))})
    content = [
        {"prompt": "three", "images": [picture(n) for n in (0, 1, 2)], "scores": [0.1, 0.9, 0.5]},
        {"prompt": "one", "images": [picture(3)], "scores": [0.5]},
        {"prompt": "tied", "images": [picture(4), picture(5)], "scores": [2, 2]},
    ]
    Dataset.from_list(content, features=features).to_parquet(tmp_path / "a.parquet")
    return tmp_path / "a.parquet", {"format": "ranked"}, [("three", 1, 0), ("three", 2, 0), ("three", 1, 2)]


def ranked_rows_of_groups(tmp_path):
    # ImageRewardDB's rows, as the hub converts them to parquet; its groups are not neighbours here
    ranks = [("a", 2), ("b", 1), ("a", 1), ("b", 2), ("a", 3)]
    content = [
        {"image": picture(n), "prompt_id": group, "prompt": f"prompt {group}", "rank": rank}
        for n, (group, rank) in enumerate(ranks)
    ]
    features = Features(
        {"image": ImageFeature(), "prompt_id": Value("string"), "prompt": Value("string"), "rank": Value("int32")}
    )
    Dataset.from_list(content, features=features).to_parquet(tmp_path / "a.parquet")
    pairs = [("prompt a", 2, 0), ("prompt a", 0, 4), ("prompt b", 1, 3), ("prompt a", 2, 4)]
    return tmp_path / "a.parquet", {"format": "ranked"}, pairs


def hpdv2_train(tmp_path):
    write_images(tmp_path / "images", range(4))
    content = [
        {"human_preference": [0, 1], "prompt": "first", "file_path": ["0.png", "1.png"], "user_hash": "x"},
        {"human_preference": [1, 0], "prompt": "second", "file_path": ["2.png", "3.png"], "user_hash": "y"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(content))
    settings = {"format": "ranked", "image_root": str(tmp_path / "images")}
    return tmp_path, settings, [("first", 1, 0), ("second", 2, 3)]


def hpdv2_test(tmp_path):
    write_images(tmp_path, range(3))
    content = {"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "rank": [3, 1, 2], "raw_annotations": [{}]}
    (tmp_path / "test.json").write_text(json.dumps([content]))
    return tmp_path, {"format": "ranked", "split": "test"}, [("p", 1, 0), ("p", 2, 0), ("p", 1, 2)]


def image_reward_json(tmp_path):
    write_images(tmp_path, range(3))
    lines = [{"prompt_id": "x", "prompt": "p", "image_path": f"{n}.png", "rank": r} for n, r in enumerate([2, 1, 2])]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "train.jsonl", {"format": "ranked"}, [("p", 1, 0), ("p", 1, 2)]


def hpdv3(tmp_path):
    write_images(tmp_path / "images", range(4))
    content = [
        {"prompt": "first", "path1": "images/0.png", "path2": "images/1.png", "confidence": None},
        {"prompt": "second", "path1": "images/3.png", "path2": "images/2.png", "model1": "flux", "model2": "sd2"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path, {"format": "manifest"}, [("first", 0, 1), ("second", 3, 2)]


def diffengine_csv(tmp_path):
    write_images(tmp_path, range(6))
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        writer = csv.writer(file)
        writer.writerow(["image", "image2", "label_0", "text"])
        writer.writerows([["0.png", "1.png", 1, "12"], ["2.png", "3.png", "", "tie"], ["4.png", "5.png", 0, "a, b"]])
    return tmp_path, {"format": "manifest"}, [("12", 0, 1), ("a, b", 5, 4)]


def manifest_lines(tmp_path):
    write_images(tmp_path, range(4))
    lines = [
        {"prompt": "first", "chosen": "0.png", "rejected": str(tmp_path / "1.png")},
        {"prompt": "second", "chosen": "./2.png", "rejected": "sub/../3.png", "confidence": 0.9},
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "m.jsonl", {"format": "manifest"}, [("first", 0, 1), ("second", 2, 3)]


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def webdataset(tmp_path):
    # as sayakpaul/pickapic_v2_webdataset
    for number, labels in enumerate(["10", "5"]):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w") as tar:
            for place, label in enumerate(labels):
                key, first = f"sample{place}", 4 * number + 2 * place
                add(tar, f"{key}.jpg_0.jpg", image(first))
                add(tar, f"{key}.jpg_1.jpg", image(first + 1))
                add(tar, f"{key}.label_0.txt", b"0.5" if label == "5" else label.encode())
                add(tar, f"{key}.original_prompt.txt", f"prompt {first}".encode())
    return tmp_path, {"format": "webdataset"}, [("prompt 0", 0, 1), ("prompt 2", 3, 2)]


def webdataset_of_chosen(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for place, ending in enumerate(["png", "jpg"]):
            add(tar, f"./deep/{place}.chosen.{ending}", image(2 * place))
            add(tar, f"./deep/{place}.json", json.dumps({"prompt": f"prompt {place}", "confidence": 0.75}).encode())
            add(tar, f"./deep/{place}.rejected.{ending}", image(2 * place + 1))
    return tmp_path / "a.tar", {"format": "webdataset"}, [("prompt 0", 0, 1), ("prompt 1", 2, 3)]


WRITERS = [
    pickapic,
    pickapic_renamed,
    chosen_rejected,
    chosen_rejected_saved,
    ranked_parquet,
    ranked_rows_of_groups,
    hpdv2_train,
    hpdv2_test,
    image_reward_json,
    hpdv3,
    diffengine_csv,
    manifest_lines,
    webdataset,
    webdataset_of_chosen,
]


@pytest.mark.parametrize("writer", WRITERS)
def test_pairs_are_those_by_hand_however_they_are_read(writer, tmp_path):
    (tmp_path / "set").mkdir()
    dataset, settings, by_hand = writer(tmp_path / "set")
    expected = [(prompt, image(chosen), image(rejected)) for prompt, chosen, rejected in by_hand]
    source = opened(tmp_path, dataset, **settings)
    straight = opened(tmp_path, dataset, in_file_order=True, cache_dir=str(tmp_path / "other"), **settings)
    assert pairs_of(source) == expected
    assert pairs_of(straight) == expected
    assert source.file_order().tolist() == list(range(len(expected)))
    assert source.counts == straight.counts
    assert source.fingerprint == straight.fingerprint
    both = [[each.read(index) for index in range(len(expected))] for each in (source, straight)]
    assert [record.pair_id for record in both[0]] == [record.pair_id for record in both[1]]
    assert len({record.pair_id for record in both[0]}) == len(expected)
    assert [record.uid for record in both[0]] == [record.uid for record in both[1]]


@pytest.mark.parametrize("in_file_order", [False, True])
@pytest.mark.parametrize("writer", [pickapic, hpdv3, webdataset])
def test_a_relative_path_is_as_good(writer, in_file_order, tmp_path, monkeypatch):
    dataset, settings, by_hand = writer(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = opened(tmp_path, dataset.relative_to(tmp_path), in_file_order=in_file_order, **settings)
    assert [prompt for prompt, _, _ in pairs_of(source)] == [prompt for prompt, _, _ in by_hand]


@pytest.mark.parametrize("writer", [pickapic, hpdv3, webdataset])
def test_a_second_start_gives_the_same_and_makes_nothing_again(writer, tmp_path):
    (tmp_path / "set").mkdir()
    dataset, settings, _ = writer(tmp_path / "set")
    first, said = opened(tmp_path, dataset, **settings), []
    second = opened(tmp_path, dataset, say=said.append, **settings)
    assert pairs_of(first) == pairs_of(second)
    assert (first.counts, first.fingerprint) == (second.counts, second.fingerprint)
    assert said == []


def test_straight_reading_goes_back_and_forth_over_row_groups(tmp_path):
    dataset = Dataset.from_list([row(n) for n in range(150)])
    dataset.to_parquet(tmp_path / "a.parquet", batch_size=70)
    source = opened(tmp_path, tmp_path / "a.parquet", in_file_order=True)
    order = [0, 149, 69, 70, 1, 100, 33, 32, 140, 2]
    assert [source.read(index).prompt for index in order] == [f"prompt {index}" for index in order]


def test_straight_reading_goes_far_back_within_a_row_group(tmp_path):
    Dataset.from_list([row(n) for n in range(400)]).to_parquet(tmp_path / "a.parquet", batch_size=400)
    source = opened(tmp_path, tmp_path / "a.parquet", in_file_order=True)
    assert [source.read(index).prompt for index in (399, 0, 398)] == ["prompt 399", "prompt 0", "prompt 398"]


@pytest.mark.parametrize("in_file_order", [False, True])
def test_forked_processes_read_beside_each_other(in_file_order, tmp_path):
    Dataset.from_list([row(n) for n in range(120)]).to_parquet(tmp_path / "a.parquet", batch_size=60)
    source = opened(tmp_path, tmp_path / "a.parquet", in_file_order=in_file_order)
    assert source.read(0).prompt == "prompt 0"  # the file is open, and rows after it are to come
    children = []
    for start in (1, 60):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                prompts = [source.read(index).prompt for index in range(start, 120)]
                os.write(writing, b"same" if prompts == [f"prompt {n}" for n in range(start, 120)] else b"else")
            finally:
                os._exit(0)
        os.close(writing)
        children.append((child, reading))
    assert [source.read(index).prompt for index in range(120)] == [f"prompt {n}" for n in range(120)]
    for child, reading in children:
        assert os.read(reading, 4) == b"same"
        os.waitpid(child, 0)


def test_straight_reading_makes_no_copy(tmp_path):
    path, _, _ = pickapic(tmp_path)
    opened(tmp_path, path, in_file_order=True)
    assert list((tmp_path / "cache").rglob("*.arrow")) == []


# ---- ids and what a record says ----


def test_ids_of_ranked_pairs_do_not_depend_on_which_image_won(tmp_path):
    write_images(tmp_path, range(2))
    path = tmp_path / "train.json"
    ids = []
    for rank in ([1, 2], [2, 1]):
        path.write_text(json.dumps([{"prompt": "p", "image_path": ["0.png", "1.png"], "rank": rank}]))
        ids.append(opened(tmp_path, path, format="ranked").read(0).pair_id)
    assert ids == [id_of(f"row 0 of {path}, split train, images 0 and 1")] * 2


def test_a_column_of_ids_makes_pairs_known_by_it(tmp_path):
    write_images(tmp_path, range(2))
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "0.png", "rejected": "1.png", "key": 7}))
    source = opened(tmp_path, path, format="manifest", columns=["id=key"])
    assert source.read(0).pair_id == id_of("7")
    assert source.read(0).uid == f"row 0 of {path}, split train (id 7)"
    assert source.fingerprint["pair_ids"] == "the rows' own"


def test_pairs_of_one_ranking_have_ids_of_their_own(tmp_path):
    write_images(tmp_path, range(3))
    path = tmp_path / "train.jsonl"
    path.write_text(
        json.dumps({"prompt": "p", "images": [f"{n}.png" for n in range(3)], "rank": [2, 1, 3], "key": "k"})
    )
    source = opened(tmp_path, path, format="ranked", columns=["id=key"])
    assert [source.read(index).pair_id for index in range(3)] == [id_of("k 0 1"), id_of("k 0 2"), id_of("k 1 2")]


def test_a_sample_of_a_tar_is_known_by_its_name(tmp_path):
    dataset, settings, _ = webdataset(tmp_path)
    record = opened(tmp_path, dataset, **settings).read(1)
    assert record.pair_id == id_of("sample1 in 00000.tar")
    assert "(id sample1 in 00000.tar)" in record.uid


def test_metadata_says_what_else_the_row_has(tmp_path):
    dataset, settings, _ = hpdv3(tmp_path)
    source = opened(tmp_path, dataset, **settings)
    assert source.read(1).metadata == {"model_0": "flux", "model_1": "sd2"}
    content = [row(0, model_0="a", model_1="b", has_label=True)]
    Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    metadata = opened(tmp_path, tmp_path / "a.parquet").read(0).metadata
    assert (metadata["model_0"], metadata["has_label"], metadata["label"]) == ("a", True, 1.0)


def test_fingerprints_tell_labels_and_files_apart(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_list([row(0), row(1)]).to_parquet(path)
    before = opened(tmp_path, path).fingerprint
    Dataset.from_list([row(0), row(1, label_0=0.0)]).to_parquet(path)
    after = opened(tmp_path, path).fingerprint
    assert before["pairs"] != after["pairs"]
    assert before["columns"] == after["columns"]


def test_a_subset_is_a_folder_or_what_the_card_lists(tmp_path):
    for name, prompt in (("small", "s"), ("large", "l")):
        (tmp_path / name).mkdir()
        Dataset.from_list([row(0, caption=prompt)]).to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    assert opened(tmp_path, tmp_path, name="large").read(0).prompt == "l"
    card = "---\nconfigs:\n- config_name: tiny\n  data_files:\n  - split: val\n    path: small/train-*\n---\ntext\n"
    (tmp_path / "README.md").write_text(card)
    assert opened(tmp_path, tmp_path, name="tiny", split="val").read(0).prompt == "s"
