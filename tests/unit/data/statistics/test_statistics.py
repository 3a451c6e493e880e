from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import config, file_of, picture, row

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.source import BadRow
from ds_dpo.data.statistics.duplicates import find_duplicates
from ds_dpo.data.statistics.image_facts import facts_of_image
from ds_dpo.data.statistics.statistics import SizeCount, choose_some, take_statistics
from ds_dpo.data.statistics.tally import quantiles
from ds_dpo.data.statistics.text import statistics_text
from ds_dpo.errors import DataError

WIDE = file_of(picture(0))  # 16 high, 20 wide
OTHER = file_of(picture(1))
NARROW = file_of(picture(2, width=8))  # 16 high: too narrow for 16 x 16
GRAY = file_of(picture(3, width=32, height=32).convert("L"), "JPEG")

ROWS = [
    row(0, caption="red", jpg_0=WIDE, jpg_1=OTHER, label_0=1.0),
    row(1, caption="red", jpg_0=WIDE, jpg_1=OTHER, label_0=0.0),  # contradicts row 0
    row(2, caption="red", jpg_0=OTHER, jpg_1=WIDE, label_0=1.0),  # says what row 1 says
    row(3, caption="", jpg_0=WIDE, jpg_1=WIDE, label_0=1.0),  # one image twice
    row(4, caption="blue", jpg_0=NARROW, jpg_1=GRAY, label_0=0.0),
    row(5, caption="blue", jpg_0=NARROW, jpg_1=GRAY, label_0=0.5),
    row(6, caption="w " * 76, jpg_0=WIDE, jpg_1=b"torn", label_0=1.0),
    row(7, caption=None, label_0=1.0),
]


def opened(folder, rows=ROWS, **fields):
    file = folder / "train.parquet"
    if not file.exists():
        pq.write_table(pa.Table.from_pylist(rows), file)
    data = config(file, cache_dir=str(folder / "cache"), **fields)
    return open_source(data, say=lambda line: None, in_file_order=True), data


def statistics_of(source, **options):
    return take_statistics(source, **{"looked_into": np.arange(len(source)), **options})


def test_every_number_of_a_small_dataset(tmp_path):
    source, _ = opened(tmp_path)
    found = statistics_of(source)
    assert (found.counts["rows"], found.counts["ties"], found.counts["dropped_ties"]) == (8, 1, 1)
    assert (found.pairs, found.pairs_looked_into, found.prompts_read) == (7, 7, 6)
    prompts = found.prompts
    assert (prompts.distinct, prompts.empty, prompts.over_75_words) == (4, 1, 1)
    # of 0, 3, 3, 3, 4, 152
    assert list(prompts.characters.values()) == [0, 0, 3, 3, 4, 152, 152]
    assert list(prompts.pairs_per_prompt.values()) == [1, 1, 1, 1, 1, 3, 3]
    labels = found.labels
    assert (labels.first_image_won, labels.second_image_won) == (4, 2)
    assert (labels.targets_of_one, labels.targets_of_half, labels.weights_of_one) == (6, 0, 6)
    images = found.images
    assert (images.images, images.distinct, images.distinct_sizes) == (10, 4, 3)
    assert [(size.height, size.width, size.count) for size in images.sizes] == [(16, 20, 8), (16, 8, 1), (32, 32, 1)]
    assert (images.pairs_of_two_sizes, images.enlarged) == (1, 1)
    assert (images.aspect_ratio["min"], images.aspect_ratio["median"]) == (0.5, 1.25)
    assert images.formats == {"PNG": 9, "JPEG": 1}
    assert images.modes == {"RGB": 9, "L": 1}


def test_repetitions_of_a_small_dataset(tmp_path):
    source, _ = opened(tmp_path)
    repeats = statistics_of(source).repeats
    assert (repeats.pairs_of_one_image, repeats.repeated_pairs) == (1, 1)
    assert (repeats.contradictions, repeats.contradicting_pairs) == (1, 3)
    assert (repeats.images_in_several_pairs, repeats.most_pairs_of_an_image) == (2, 4)
    assert "ranking_id 103" in repeats.pairs_of_one_image_examples[0]
    assert "ranking_id 102" in repeats.repeated_pairs_examples[0]
    first, second = repeats.contradictions_examples[0]
    assert ("ranking_id 100" in first, "ranking_id 101" in second) == (True, True)


def test_bad_pairs_are_named_in_file_order_and_said_to_stop_a_run_or_not(tmp_path):
    source, data = opened(tmp_path, max_bad_rows=2)
    found = statistics_of(source)
    torn, no_prompt = found.bad_pairs
    assert "ranking_id 106" in torn.uid
    assert torn.reason.startswith("rejected image: not an image")
    assert "ranking_id 107" in no_prompt.uid
    assert no_prompt.reason.startswith("caption")
    assert "a run replaces each" in statistics_text(found, data)
    assert "a run would stop" in statistics_text(found, data.model_copy(update={"max_bad_rows": 1}))


def test_ties_kept_as_soft_targets_are_counted_and_contradict_nothing(tmp_path):
    rows = [row(caption="q", jpg_0=WIDE, jpg_1=OTHER, label_0=label) for label in (1.0, 0.5)]
    source, data = opened(tmp_path, rows, ties="soft")
    found = statistics_of(source)
    assert (found.labels.targets_of_one, found.labels.targets_of_half) == (1, 1)
    assert (found.labels.first_image_won, found.labels.second_image_won) == (1, 0)
    assert (found.repeats.contradictions, found.repeats.repeated_pairs) == (0, 0)
    assert "1 (100.0 %) of 1 decided" in statistics_text(found, data)


def test_the_same_numbers_from_several_threads(tmp_path):
    source, _ = opened(tmp_path)
    assert statistics_of(source, threads=4) == statistics_of(source, threads=1)


def test_pairs_not_looked_into_have_prompts_and_no_images(tmp_path):
    source, data = opened(tmp_path)
    none = statistics_of(source, looked_into=np.array([], np.int64))
    assert (none.images, none.repeats, none.prompts.distinct, len(none.bad_pairs)) == (None, None, 4, 1)
    assert "no image was read" in statistics_text(none, data)
    some = statistics_of(source, looked_into=np.array([0, 4]))
    assert (some.images.images, some.repeats.contradictions, some.pairs_looked_into) == (4, 0, 2)
    assert "there may be more" in statistics_text(some, data)


def test_each_pair_is_handed_on_once(tmp_path):
    source, _ = opened(tmp_path)
    passed = []
    statistics_of(source, on_pair=lambda index, pair: passed.append((index, isinstance(pair, BadRow))))
    assert passed == [(0, False), (1, False), (2, False), (3, False), (4, False), (5, False), (6, True)]


def test_images_are_measured_against_the_bucket_that_they_are_cut_to(tmp_path):
    tall = [file_of(picture(n, width=24, height=48)) for n in (1, 2)]
    square = [file_of(picture(n, width=40, height=40)) for n in (3, 4)]
    rows = [row(0, jpg_0=tall[0], jpg_1=tall[1]), row(1, jpg_0=square[0], jpg_1=square[1])]
    source, data = opened(tmp_path, rows, resolution=32, aspect_buckets=True, bucket_step=8)
    found = statistics_of(source)
    # 32 x 32 pixels are 40 x 24 at best with multiples of 8: 48 x 16 is beyond 2 : 1
    assert found.buckets == [SizeCount(height=32, width=32, count=1), SizeCount(height=40, width=24, count=1)]
    assert found.images.enlarged == 0  # 24 x 48 would be enlarged to cover 32 x 32
    assert "pairs by bucket" in statistics_text(found, data)


def test_a_format_without_sides_leaves_out_who_was_first(tmp_path):
    pq.write_table(
        pa.Table.from_pylist([{"prompt": "p", "chosen": WIDE, "rejected": OTHER}]), tmp_path / "train.parquet"
    )
    source, data = opened(tmp_path, format="chosen_rejected")
    found = statistics_of(source)
    assert (found.labels.first_image_won, found.labels.second_image_won) == (None, None)
    assert "not known" in statistics_text(found, data)


def test_duplicates_agree_with_comparing_every_two_pairs():
    rng = np.random.default_rng(0)
    prompts, chosen, rejected = rng.integers(0, 3, (3, 80))
    winners = rng.integers(-1, 2, 80).astype(np.int8)
    found = find_duplicates(
        **{
            name: np.array([bytes([value] * 16) for value in values + 1], "S16")
            for name, values in (("prompts", prompts), ("chosen", chosen), ("rejected", rejected))
        },
        winners=winners,
    )
    answers = []  # prompt, both images, and the one that won
    for prompt, one, other, winner in zip(prompts, chosen, rejected, winners, strict=True):
        won = None if one == other or winner == 0 else one if winner == 1 else other
        answers.append((prompt, frozenset((one, other)), won))
    contrary = [
        (i, j)
        for i, j in combinations(range(80), 2)
        if answers[i][:2] == answers[j][:2] and None not in (answers[i][2], answers[j][2]) and answers[i] != answers[j]
    ]
    assert found.pairs_of_one_image.tolist() == [i for i in range(80) if chosen[i] == rejected[i]]
    assert found.repeated_pairs.tolist() == [j for j in range(80) if answers[j] in answers[:j]]
    assert found.contradicting_pairs == len({i for pair in contrary for i in pair})
    first_of_each = {}
    for i, j in contrary:
        first_of_each.setdefault(answers[i][:2], (i, j))
    assert sorted(map(tuple, found.contradictions.tolist())) == sorted(first_of_each.values())
    uses = Counter(image for one, other in zip(chosen, rejected, strict=True) for image in {one, other})
    assert found.pairs_per_image.tolist() == [uses[image] for image in sorted(uses)]


def test_an_image_too_long_for_training_is_bad_here_too():
    # covering 1024 x 1024 it would have 1024 x 102400 pixels, more than 2**26
    thin = file_of(picture(0, width=1000, height=10))
    assert facts_of_image(thin, training_size=(64, 64)).size == (10, 1000)
    with pytest.raises(DataError, match="too long and thin"):
        facts_of_image(thin, training_size=(1024, 1024))


def test_an_open_image_is_known_by_its_pixels():
    facts = [facts_of_image(picture(number), training_size=(16, 16)) for number in (0, 0, 1)]
    assert facts[0].digest == facts[1].digest != facts[2].digest
    assert (facts[0].format, facts[0].mode, facts[0].size) == ("no file", "RGB", (16, 20))


def test_quantiles_are_values_that_occur():
    assert quantiles({10: 1, 20: 1, 30: 2}) == {
        "min": 10, "5%": 10, "25%": 10, "median": 20, "75%": 30, "95%": 30, "max": 30
    }  # fmt: skip
    assert quantiles({}) == {}


def test_some_pairs_are_chosen_by_seed_and_name():
    chosen = choose_some(1000, 20, seed=1, name="sheet")
    assert len(set(chosen.tolist())) == 20
    assert chosen.tolist() == sorted(chosen.tolist())
    assert chosen.tolist() == choose_some(1000, 20, seed=1, name="sheet").tolist()
    assert chosen.tolist() != choose_some(1000, 20, seed=2, name="sheet").tolist()
    assert chosen.tolist() != choose_some(1000, 20, seed=1, name="images").tolist()
    for wanted in (None, 5, 6):
        assert choose_some(5, wanted, seed=1, name="sheet").tolist() == [0, 1, 2, 3, 4]
    assert choose_some(5, 0, seed=1, name="sheet").tolist() == []
