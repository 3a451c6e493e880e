"""Training, data_stats and cache.py make the same of a set: the pairs that were drawn, or one refusal.

The sets are drawn from seeds: rows, settings, the program that writes them, and what is odd about them.
"""

import json
from collections import Counter

import pytest
from drawn_pairs import Pair, draw_set
from parquet_sets import write_parquet
from text_and_tar_sets import write_tar, write_text
from three_readers import Read, of_cache, of_data_stats, of_training

from ds_dpo.config.load import load_config

# seeds of each kind of set; together 240 sets
SEEDS = {
    **{("parquet", layout): range(30) for layout in ("labelled", "ordered", "lists", "grouped")},
    **{("text", layout): range(100, 122) for layout in ("labelled", "ordered", "lists", "grouped")},
    **{("tar", layout): range(200, 216) for layout in ("labelled", "ordered")},
}
WRITERS = {"parquet": write_parquet, "text": write_text, "tar": write_tar}
NO_PAIR = "no pair is left to train on"


@pytest.fixture(scope="module")
def base():
    options = ["--data.resolution", "16", "--data.workers", "0", "--data.crop", "center"]
    options += ["--data.flip", "off", "--data.prompt_dropout", "0"]
    return load_config(["--config", "miniature", *options]).config


def config_of(base, drawn):
    plain = {"expected_pairs": None, "columns": [], "dataset": str(drawn.dataset), "split": "train"}
    return base.model_copy(update={"data": base.data.model_copy(update=plain | drawn.fields)})


def without_ids(outcome):
    return [
        Pair(each.prompt, each.chosen, each.rejected, None) if isinstance(each, Read) else None
        for each in outcome.pairs
    ]


def check(drawn, base, folder):
    """Read a set in all ways; returns "refused" or "read"."""
    config = config_of(base, drawn)
    trained, shown, cached = (read(config, folder / read.__name__) for read in (of_training, of_data_stats, of_cache))
    assert trained.refusal == shown.refusal == cached.refusal
    if drawn.refusal:
        assert all(words in (trained.refusal or "") for words in drawn.refusal), (drawn.refusal, trained)
        return "refused"
    expected = drawn.pairs()
    if not expected:
        assert (trained.refusal or "").endswith(NO_PAIR)
        return "no pair"
    assert trained.refusal is None
    assert trained.pairs == shown.pairs == cached.pairs
    assert trained.counts == shown.counts == cached.counts
    assert [pair and (pair.prompt, pair.chosen, pair.rejected) for pair in without_ids(trained)] == [
        pair and (pair.prompt, pair.chosen, pair.rejected) for pair in expected
    ]
    if drawn.fields.get("confidence") != "target":
        assert all(
            each.target == pair.target for each, pair in zip(trained.pairs, expected, strict=True) if pair is not None
        )
    ids = [each.pair_id for each in trained.pairs if isinstance(each, Read)]
    assert len(set(ids)) == len(ids)
    return "read"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEDS, ids=" ".join)
def test_a_set_gives_the_drawn_pairs_or_one_refusal(kind, base, tmp_path):
    outcomes = Counter()
    for seed in SEEDS[kind]:
        drawn = WRITERS[kind[0]](draw_set(seed, tmp_path / f"{seed}", kind[1]))
        try:
            outcomes[check(drawn, base, tmp_path / f"{seed} read")] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {drawn.name}, {json.dumps(drawn.fields)}: {error}") from error
    assert outcomes["refused"] >= 2
    assert outcomes["read"] >= len(SEEDS[kind]) / 3


def test_there_are_enough_sets():
    assert sum(map(len, SEEDS.values())) == 240
