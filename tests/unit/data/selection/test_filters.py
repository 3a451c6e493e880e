"""Which pairs filters leave, and what they count: by hand, from columns alone."""

import json
import re

import pytest
from datasets import Dataset
from pair_files import config, row

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.source import BadRowError
from ds_dpo.errors import DataError

# prompt, label_0, model_0, model_1, has_label, confidence; images are no images: no filter may open one
ROWS = [
    ("a", 1.0, "dreamlike-2", "Dreamlike-photoreal", True, 0.9),
    ("a", 0.5, "dreamlike-2", "dreamlike-2", True, 0.9),
    ("b", 0.0, "sdxl", "dreamlike-2", True, 0.4),
    ("a", 0.0, "dreamlike-2", "dreamlike-2", False, None),
    ("a", 1.0, "dreamlike-2", None, True, 0.6),
    ("c", None, "sdxl", "sdxl", None, float("nan")),
    ("a", 1.0, "my dreamlike", "dreamlike-2", True, 0.2),
]
ZEROS = {f"dropped_{name}": 0 for name in ("label", "ties", "confidence", "models", "prompt_limit")}


@pytest.fixture
def path(tmp_path):
    names = ("caption", "label_0", "model_0", "model_1", "has_label", "confidence")
    content = [
        row(n) | {"jpg_0": b"no image", "jpg_1": b"neither"} | dict(zip(names, values, strict=True))
        for n, values in enumerate(ROWS)
    ]
    Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def opened(path, *, say=lambda line: None, **fields):
    return open_source(config(path, cache_dir=str(path.parent / "cache"), **fields), say=say, in_file_order=True)


def rows_of(source):
    """Row numbers, from the ids that the test's rows have."""
    return [source.read(index).metadata["ranking_id"] - 100 for index in range(len(source))]


@pytest.mark.parametrize(
    ("fields", "rows", "counts"),
    [
        ({}, [0, 2, 3, 4, 6], {"dropped_ties": 2, "prompts": 2}),
        ({"ties": "soft"}, [0, 1, 2, 3, 4, 5, 6], {"prompts": 3}),
        ({"has_label": "require"}, [0, 2, 4, 6], {"dropped_label": 2, "dropped_ties": 1, "prompts": 2}),
        ({"min_confidence": 0.6}, [0, 3, 4], {"dropped_ties": 2, "dropped_confidence": 2, "prompts": 1}),
        ({"models": ["dreamlike"]}, [0, 3, 6], {"dropped_ties": 2, "dropped_models": 2, "prompts": 1}),
        ({"models": ["sdxl", "DREAMLIKE"]}, [0, 2, 3, 6], {"dropped_ties": 2, "dropped_models": 1, "prompts": 2}),
        ({"max_pairs_per_prompt": 2}, [0, 2, 3], {"dropped_ties": 2, "dropped_prompt_limit": 2, "prompts": 2}),
        ({"max_pairs_per_prompt": 1, "ties": "soft"}, [0, 2, 5], {"dropped_prompt_limit": 4, "prompts": 3}),
        (
            {"models": ["dreamlike"], "min_confidence": 0.3, "max_pairs_per_prompt": 1, "has_label": "require"},
            [0],
            {"dropped_label": 2, "dropped_ties": 1, "dropped_confidence": 1, "dropped_models": 2, "prompts": 1},
        ),
    ],
)
def test_what_each_filter_leaves_and_counts(fields, rows, counts, path):
    source = opened(path, **fields)
    assert rows_of(source) == rows
    assert source.counts == ZEROS | {"rows": 7, "ties": 2, "pairs": len(rows)} | counts


def test_only_the_first_rows_are_looked_at(path):
    source = opened(path, max_rows=3)
    assert rows_of(source) == [0, 2]
    assert source.counts == ZEROS | {"rows": 3, "ties": 1, "dropped_ties": 1, "pairs": 2, "prompts": 2}
    assert len(opened(path, max_rows=100)) == 5


def test_the_log_says_what_was_left_out_and_why(path):
    fields = {"has_label": "require", "min_confidence": 0.5, "models": ["dreamlike-2"], "max_pairs_per_prompt": 1}
    assert opened(path, **(fields | {"models": ["dreamlike"]})).description == (
        f"{path}, split train: 7 rows, 2 left out without a label, 1 ties left out, 2 left out for low confidence, 1 "
        "left out for other models, 1 pairs of 1 prompts"
    )
    soft = opened(path, ties="soft", max_pairs_per_prompt=4).description
    assert "7 rows, 2 ties trained towards equality, 1 left out as further pairs of a prompt, 6 pairs of 3" in soft


def test_ties_are_soft_targets_with_image_0_as_chosen(path):
    source = opened(path, ties="soft", confidence="target")
    record = source.read(1)
    assert (record.target_probability, record.chosen, record.rejected) == (0.5, b"no image", b"neither")
    assert [source.read(index).target_probability for index in range(7)] == pytest.approx(
        [0.9, 0.5, 0.4, 1.0, 0.6, 0.5, 0.2]
    )


def test_confidence_is_a_weight_where_asked(path):
    source = opened(path, confidence="weight")
    assert [source.read(index).weight for index in range(5)] == pytest.approx([0.9, 0.4, 1.0, 0.6, 0.2])
    assert {source.read(index).target_probability for index in range(5)} == {1.0}
    plain = opened(path)
    assert {(plain.read(n).weight, plain.read(n).target_probability) for n in range(5)} == {(1.0, 1.0)}


def ranking(tmp_path, *entries):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def test_pairs_of_a_ranking_are_counted_beside_its_rows(tmp_path):
    entries = [
        {"prompt": "a", "images": ["0", "1", "2", "3"], "rank": [1, 1, 2, 3], "models": ["x", "x", "y", "x"]},
        {"prompt": "b", "images": ["4"], "rank": [1], "models": ["x"]},
    ]
    path = ranking(tmp_path, *entries)
    source = opened(path, format="ranked")
    counted = {"rows": 2, "candidates": 6, "ties": 1}
    assert source.counts == ZEROS | counted | {"dropped_ties": 1, "pairs": 5, "prompts": 1}
    assert "2 rows, 6 pairs in them, 1 ties left out, 5 pairs of 1 prompts" in source.description
    of_x = opened(path, format="ranked", models=["x"])
    assert of_x.counts == ZEROS | counted | {"dropped_ties": 1, "dropped_models": 3, "pairs": 2, "prompts": 1}
    limited = opened(path, format="ranked", ties="soft", max_pairs_per_prompt=2)
    assert limited.counts == ZEROS | counted | {"dropped_prompt_limit": 4, "pairs": 2, "prompts": 1}
    assert limited.index.entries[["row", "first", "second", "target"]].tolist() == [(0, 0, 1, 0.5), (0, 0, 2, 1.0)]


@pytest.mark.parametrize("verdict", ["rank", "score", "preference"])
def test_a_row_whose_images_have_no_verdict_each_is_a_bad_row(tmp_path, verdict):
    counts = {"a": (3, 2), "b": (2, 2), "c": (2, 1), "d": (2, 0), "e": (1, 1), "f": (2, 3)}
    entries = [
        {"prompt": prompt, "images": [f"{n}.png" for n in range(images)], verdict: list(range(verdicts))}
        for prompt, (images, verdicts) in counts.items()
    ]
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(b"no image")
    source = opened(ranking(tmp_path, *entries), format="ranked")
    bad, good = [], []
    for index in range(len(source)):
        try:
            good.append(source.read(index).prompt)
        except BadRowError as error:
            bad.append(error.bad_row)
    assert good == ["b"]
    # one pair of the two ranks in a, three of those in f, and one in each row that has too few for any
    rows = [0, 2, 3, 5, 5, 5]
    assert [int(re.match(r"row (\d)", one.uid)[1]) for one in bad] == rows
    numbers = [list(counts.values())[row] for row in rows]
    assert [one.reason for one in bad] == [f"images has {i} images, and {verdict} has {v} values" for i, v in numbers]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ties": "error"}, "2 of 7 rows are ties, the first is row 1; data.ties is error"),
        ({"models": ["flux"]}, "5 left out for other models, 0 pairs of 0 prompts; no pair is left to train on"),
    ],
)
def test_filters_that_cannot_be_met_are_refused(fields, message, path):
    with pytest.raises(DataError, match=message):
        opened(path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"has_label": "require"}, "data.has_label require needs a column for role has_label"),
        ({"models": ["sdxl"]}, "data.models sdxl needs a column for role model_0 and model_1"),
        ({"min_confidence": 0.5}, "data.min_confidence 0.5 needs a column for role confidence"),
        ({"confidence": "target"}, "data.confidence target needs a column for role confidence"),
    ],
)
def test_a_filter_without_its_column_is_refused(fields, message, tmp_path):
    Dataset.from_list([row(0)]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.parquet", **fields)


@pytest.mark.parametrize(
    ("use", "value", "message"),
    [
        ("target", 1.5, "confidence is 1.5 in row 1, and cannot be a target in 1 pairs; 0 to 1 would fit"),
        ("weight", -1.0, "confidence is -1 in row 1, and cannot be a weight in 1 pairs; 0 or more would fit"),
        ("weight", float("inf"), "confidence is inf in row 1"),
    ],
)
def test_a_confidence_out_of_range_is_refused_where_it_is_used(use, value, message, tmp_path):
    content = [row(0, confidence=0.5), row(1, confidence=value)]
    Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    assert len(opened(tmp_path / "a.parquet")) == 2
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.parquet", confidence=use)
