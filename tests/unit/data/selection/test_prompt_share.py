"""held_out.share: prompts are divided by a formula, with all their pairs, the same in every program."""

import json
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from pair_files import row

from ds_dpo.config.load import load_config
from ds_dpo.data.reading.run_pairs import open_held_out_pairs, open_trained_on
from ds_dpo.data.selection.prompt_share import PromptShare
from ds_dpo.errors import DataError


def place(prompt):
    """The formula of docs/held_out.md, by hand."""
    return int.from_bytes(blake2b(prompt.encode(), digest_size=8, key=b"held_out.share").digest(), "little") / 2**64


def options(path, *more):
    data = ["--data.dataset", str(path), "--data.cache_dir", str(path.parent / "cache")]
    return load_config(["--config", "miniature", *data, *more]).config


@pytest.fixture
def path(tmp_path):
    rows = [row(n, caption=f"prompt {n % 10}") for n in range(40)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def prompts(source):
    return [source.read(index).prompt for index in range(len(source))]


def ignore(line):
    pass


@pytest.mark.parametrize("in_file_order", [False, True])
def test_sides_are_the_formulas_and_share_no_prompt(path, in_file_order):
    config = options(path, "--held_out.share", "0.4")
    trained_on = open_trained_on(config, say=ignore, in_file_order=in_file_order)
    held_out = open_held_out_pairs(config, say=ignore)
    wanted = {f"prompt {n}" for n in range(10) if place(f"prompt {n}") < 0.4}
    assert 0 < len(wanted) < 10
    assert set(prompts(held_out)) == wanted
    assert len(prompts(held_out)) == 4 * len(wanted)
    assert set(prompts(trained_on)) == {f"prompt {n}" for n in range(10)} - wanted
    assert trained_on.counts["dropped_held_out"] == held_out.counts["pairs"] == 4 * len(wanted)
    assert held_out.counts["dropped_trained_on"] == trained_on.counts["pairs"] == 40 - 4 * len(wanted)
    assert f"40 rows, {4 * len(wanted)} held out, {40 - 4 * len(wanted)} pairs of" in trained_on.description
    assert f"40 rows, {40 - 4 * len(wanted)} trained on, {4 * len(wanted)} pairs of" in held_out.description


def test_a_larger_share_holds_out_more_beside_the_same_and_draws_stay(path):
    everything = open_trained_on(options(path), say=ignore)
    assert "dropped_held_out" not in everything.counts
    ids = {everything.read(n).uid: everything.read(n).pair_id for n in range(40)}
    before = set()
    for share in ("0.3", "0.6", "0.9"):
        held_out = open_held_out_pairs(options(path, "--held_out.share", share), say=ignore)
        assert before <= set(prompts(held_out))
        before = set(prompts(held_out))
        records = [held_out.read(n) for n in range(len(held_out))]
        assert all(record.pair_id == ids[record.uid] for record in records)


def texts(type_, *values):
    """A column of text in which a value need not be UTF-8."""
    stored = pa.array(values, pa.binary() if type_ == pa.string() else pa.large_binary())
    return pa.Array.from_buffers(type_, len(stored), stored.buffers(), stored.null_count)


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_a_prompt_that_is_missing_or_no_text_stops_nothing(type_):
    column = pa.chunked_array([texts(type_, b"a", None), texts(type_, b"\xff\xfe", b"b", b"a")])
    held_out, trained_on = (
        PromptShare(share=place("a") + 1e-9, side=side).rows(column) for side in ("held_out", "trained_on")
    )
    assert held_out[[0, 1, 3, 4]].tolist() == [True, False, place("b") <= place("a"), True]
    assert np.array_equal(held_out, ~trained_on)
    encoded = column.slice(0, 2).dictionary_encode()
    assert PromptShare(share=place("a") + 1e-9, side="held_out").rows(encoded).tolist() == [True, False]


def test_expected_pairs_counts_those_held_out_too(path):
    lines = []
    open_trained_on(options(path, "--held_out.share", "0.4", "--data.expected_pairs", "40"), say=lines.append)
    assert lines[-1].endswith("40 pairs, as expected")


@pytest.mark.parametrize(
    ("share", "num_prompts", "message"),
    [
        (1e-9, 3, r"held_out\.share 1e-09: .*: 3 rows, 3 trained on, 0 pairs of 0 prompts; no pair is left to hold"),
        (1 - 1e-9, 3, "3 rows, 3 held out, 0 pairs of 0 prompts; no pair is left to train on"),
    ],
)
def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path, share, num_prompts, message):
    Dataset.from_list([row(n) for n in range(num_prompts)]).to_parquet(tmp_path / "a.parquet")
    config = options(tmp_path / "a.parquet", "--held_out.share", str(share))
    opened = open_held_out_pairs if share < 0.5 else open_trained_on
    with pytest.raises(DataError, match=message):
        opened(config, say=ignore)


def test_one_pair_is_too_few_to_hold_out(tmp_path):
    smallest, second = sorted(place(f"prompt {n}") for n in range(6))[:2]
    Dataset.from_list([row(n) for n in range(6)]).to_parquet(tmp_path / "a.parquet")
    config = options(tmp_path / "a.parquet", "--held_out.share", str((smallest + second) / 2))
    with pytest.raises(DataError, match=r"1 pairs of 1 prompts; an interval needs at least 2 pairs: give a larger hel"):
        open_held_out_pairs(config, say=ignore)


def test_held_out_pairs_have_their_own_format_and_columns(path, tmp_path):
    entries = [{"text": f"other {n}", "chosen": "1.png", "rejected": "2.png"} for n in range(3)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(row(0)["jpg_0"])
    own = ["--held_out.dataset", str(tmp_path / "held.jsonl"), "--held_out.format", "manifest"]
    assert prompts(open_held_out_pairs(options(path, *own), say=ignore)) == ["other 0", "other 1", "other 2"]
    columns = ["--held_out.columns", "prompt=chosen"]
    assert prompts(open_held_out_pairs(options(path, *own, *columns), say=ignore)) == ["1.png"] * 3
    # columns of data are of data's format
    renamed = ["--data.columns", "prompt=ranking_id"]
    assert len(open_held_out_pairs(options(path, *own, *renamed), say=ignore)) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--held_out.split", "test"],
            r"held_out\.split test: data\.dataset \S+ has no split test; it has train; held_out\.share would hold out",
        ),
        (["--held_out.dataset", "nowhere.parquet"], r"held_out: held_out\.dataset nowhere\.parquet: there is no such"),
        (["--held_out.split", "train", "--held_out.format", "manifest"], r"has no split train; it has no \.jsonl"),
        (
            ["--held_out.split", "train", "--held_out.columns", "prompt=x"],
            r"held_out: .*held_out\.columns has prompt=x",
        ),
    ],
)
def test_errors_name_the_fields_of_held_out(path, more, message):
    folder = path.parent / "set"
    folder.mkdir()
    path.rename(folder / "train.parquet")
    with pytest.raises(DataError, match=message):
        open_held_out_pairs(options(folder, *more), say=ignore)
