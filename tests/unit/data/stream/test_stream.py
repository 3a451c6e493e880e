"""The steps of a stream are the same for any number of ranks and workers, any micro-batch and any restart."""

from itertools import islice

import pytest
import torch
from datasets import Dataset
from pair_files import ListedPairs, config, file_of, picture, row
from stream_steps import PAIRS_PER_STEP, RANDOM, differing, steps_of, stream_of

from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.stream.order import PairOrder, place_of

# 23 pairs are no multiple of the step, so that steps span epochs; as buckets, one is smaller than a step
SHAPES = [(16, 24), (16, 16), (24, 16)]
SOURCES = {"square": ListedPairs(23), "buckets": ListedPairs(13, 3, 7, bucket_shapes=SHAPES)}
NUM_STEPS = 9  # 72 pairs: epochs 0, 1, 2 and part of 3


@pytest.fixture(scope="module")
def references():
    return {name: steps_of(source, NUM_STEPS, **RANDOM) for name, source in SOURCES.items()}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("world", "micro"), [(2, 2), (4, 1), (1, 1), (8, 1), (2, 4)])
def test_a_step_is_the_same_for_any_world_size_and_micro_batch(name, world, micro, references):
    steps = steps_of(SOURCES[name], NUM_STEPS, world=world, micro=micro, **RANDOM)
    assert differing(references[name], steps) == set()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("micro", "workers"), [(8, 1), (8, 3), (2, 3)])
def test_a_step_is_the_same_for_any_number_of_workers(name, micro, workers, references):
    steps = steps_of(SOURCES[name], NUM_STEPS, micro=micro, workers=workers, prefetch=3, **RANDOM)
    assert differing(references[name], steps) == set()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("done", "world", "micro", "workers"), [(1, 2, 2, 0), (3, 4, 1, 1), (4, 2, 4, 3), (6, 1, 8, 1), (7, 8, 1, 0)]
)
def test_a_resumed_stream_goes_on_where_it_was(name, done, world, micro, workers, references):
    pairs_seen = done * PAIRS_PER_STEP
    layout = {"world": world, "micro": micro, "workers": workers}
    resumed = steps_of(SOURCES[name], NUM_STEPS - done, pairs_seen=pairs_seen, **layout, **RANDOM)
    assert differing(references[name][done:], resumed) == set()


def test_steps_hold_the_order_s_pairs_and_drop_nothing(references):
    seen = torch.cat([step.pair_ids for step in references["square"]]).tolist()
    ids = [id_of(f"row {index}") for index in range(23)]
    assert seen == [ids[place_of(position, num_pairs=23, seed=3)[0]] for position in range(72)]
    for epoch in range(3):
        assert sorted(seen[epoch * 23 : epoch * 23 + 23]) == sorted(ids)


def test_all_pairs_of_a_step_are_of_one_bucket_and_have_its_size(references):
    order = PairOrder([13, 3, 7], pairs_per_step=PAIRS_PER_STEP, seed=3)
    bucket_of = [0] * 13 + [1] * 3 + [2] * 7
    shapes_seen = []
    for number, step in enumerate(references["buckets"]):
        indices = [order.place(number * PAIRS_PER_STEP + offset)[0] for offset in range(PAIRS_PER_STEP)]
        assert step.pair_ids.tolist() == [id_of(f"row {index}") for index in indices]
        (bucket,) = {bucket_of[index] for index in indices}
        height, width = SHAPES[bucket]
        assert step.chosen_pixels.shape == step.rejected_pixels.shape == (8, 3, height, width)
        assert step.chosen_time_ids[:, 4:].unique(dim=0).tolist() == [[height, width]]
        shapes_seen.append(SHAPES[bucket])
    # epochs 0, 1 and 2 have floor(3 n / 8) steps of a bucket of n pairs: 4, 1 and 2; the last two are of epoch 3
    assert [shapes_seen[:7].count(shape) for shape in SHAPES] == [4, 1, 2]


def test_a_pair_s_draws_differ_from_visit_to_visit_and_from_pair_to_pair(references):
    for steps in references.values():
        noise = torch.cat([step.noise for step in steps])
        assert len(noise.flatten(1).unique(dim=0)) == 72


def test_resuming_after_a_billion_pairs_starts_at_once():
    source = ListedPairs(10**9)
    step = next(iter(stream_of(source, pairs_seen=10**12)))
    expected = [place_of(10**12 + offset, num_pairs=10**9, seed=3)[0] for offset in range(PAIRS_PER_STEP)]
    assert step.pair_ids.tolist() == [id_of(f"row {index}") for index in expected]


def test_one_pair_is_a_dataset():
    (step,) = steps_of(ListedPairs(1), 1)
    assert len(step.pair_ids.unique()) == 1
    assert len(step.noise.flatten(1).unique(dim=0)) == PAIRS_PER_STEP  # 8 visits


def test_a_parquet_file_through_workers(tmp_path):
    rows = [row(number, label_0=float(number % 2)) for number in range(6)]
    rows[3]["jpg_0"] = file_of(picture(6))[:100]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    source = open_source(config(tmp_path / "a.parquet", cache_dir=str(tmp_path / "cache")), say=print)
    plain = steps_of(source, 2, micro=4)
    assert differing(plain, steps_of(source, 2, micro=4, workers=2)) == set()
    stream = stream_of(source)
    for _ in islice(stream, 2):
        pass
    assert {bad_row.uid for bad_row in stream.bad_rows} == {
        f"row 3 of {tmp_path / 'a.parquet'}, split train (ranking_id 103)"
    }
    by_id = {id_of(f"{100 + n} left-{n} right-{n}"): n for n in range(6)}
    for step in plain:
        for pair_id, prompt in zip(step.pair_ids.tolist(), step.prompts, strict=True):
            assert prompt == f"prompt {by_id[pair_id]}"
