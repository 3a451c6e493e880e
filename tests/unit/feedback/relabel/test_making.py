"""Scores of pairs: each image once for each of its prompts, the same after kills, and the labels that come of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from pair_files import config, file_of, picture, row
from small_pair_cache import PLACE

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import ConfigError
from ds_dpo.feedback.relabel.labels import label_pairs, read_scores, report_of, write_labels
from ds_dpo.feedback.relabel.making import ScoresMaking
from ds_dpo.feedback.relabel.request import LabelOptions, data_to_label
from ds_dpo.feedback.relabel.text import report_text
from ds_dpo.making.make import make

NUM_PAIRS = 12
# each pair has two images of its own, but 5 shares its second one with 4, under another prompt and under the same one
SHARED, TORN, NO_PROMPT = 5, 7, 9
# pair 9 is bad and never scored; pair 5 has image 9 of pair 4, for the same prompt
DISTINCT = 2 * NUM_PAIRS - 2 - 1


@pytest.fixture
def data(tmp_path):
    rows = [row(number, label_0=float(number % 2)) for number in range(NUM_PAIRS)]
    rows[SHARED] |= {"caption": "prompt 4", "jpg_1": rows[4]["jpg_1"]}
    rows[TORN] |= {"jpg_0": file_of(picture(99))[:200]}
    rows[NO_PROMPT] |= {"caption": None}
    rows[2] |= {"label_0": 0.5}
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    return config(tmp_path / "a.parquet", cache_dir=str(tmp_path / "cache"))


def brightness(image):
    return float(np.asarray(image, dtype=np.float64).mean())


class Scores:
    """Scores by brightness, and notes each call in a file; kills its process at a call."""

    def __init__(self, notes, *, name="bright", higher_is_better=True, dies_at=None, images_at_once=3):
        self.notes, self.name, self.higher_is_better, self.dies_at = notes, name, higher_is_better, dies_at
        self.images_at_once, self.record, self.calls = images_at_once, {"kind": name}, 0

    def score(self, images, prompts):
        assert len(images) == len(prompts) <= self.images_at_once
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        with self.notes.open("a") as file:
            file.writelines(f"{brightness(image)} {prompt}\n" for image, prompt in zip(images, prompts, strict=True))
        return np.array([brightness(image) for image in images])


class Judge:
    """Prefers the brighter image, and the one that it is shown first."""

    name, images_at_once = "judge", 4
    record = {"kind": "judge"}  # noqa: RUF012

    def prefer(self, images, rivals, prompts):
        assert len(images) == len(rivals) == len(prompts) <= 2
        return np.array([0.7 if brightness(a) > brightness(b) else 0.5 for a, b in zip(images, rivals, strict=True)])


def making(out, data, scorers, said=None):
    source = open_source(data_to_label(data), say=lambda line: None, in_file_order=True)
    say = (lambda line: None) if said is None else said.append
    return ScoresMaking(out=out, source=source, scorers=scorers, unit_pairs=5, workers=0, place=PLACE, say=say)


def scored(out, data, scorers):
    return read_scores(out, make(making(out, data, scorers)))


def expected_margins(data):
    source = open_source(data_to_label(data), say=lambda line: None, in_file_order=True)
    margins = []
    for index in range(len(source)):
        if index in (TORN, NO_PROMPT):
            margins.append(np.nan)
            continue
        pair = source.read(index)
        lower, higher = (pair.chosen, pair.rejected) if pair.image_numbers[0] == 0 else (pair.rejected, pair.chosen)
        from ds_dpo.data.images import decode_rgb

        margins.append(brightness(decode_rgb(lower)) - brightness(decode_rgb(higher)))
    return margins


def test_margins_are_of_the_lower_image_and_each_image_is_scored_once(tmp_path, data) -> None:
    notes = tmp_path / "notes"
    dark = Scores(tmp_path / "other", name="dark", higher_is_better=False)
    scores = scored(tmp_path / "out", data, [Scores(notes), dark, Judge()])
    expected = np.array(expected_margins(data))
    assert scores.margins["bright"].tolist() == pytest.approx(expected.tolist(), nan_ok=True)
    assert scores.margins["dark"].tolist() == pytest.approx((-expected).tolist(), nan_ok=True)
    # both orders: (0.7 + 1 - 0.5) / 2 = 0.6 for the brighter one, 2 * 0.6 - 1
    assert scores.margins["judge"].tolist() == pytest.approx((0.2 * np.sign(expected)).tolist(), nan_ok=True)
    assert len(notes.read_text().splitlines()) == DISTINCT - 1  # the torn image cannot be decoded
    labels = [float(number % 2) for number in range(NUM_PAIRS)]
    labels[2], labels[NO_PROMPT] = 0.5, np.nan
    assert scores.human.tolist() == pytest.approx(labels, nan_ok=True)


def labels_of(out, data, scorers, **options):
    record = make(making(out, data, scorers))
    scores = read_scores(out, record)
    chosen = LabelOptions(**options)
    found, calibrated = label_pairs(scores, chosen)
    number = write_labels(out, scores, found, record)
    return number, report_of(scores, found, calibrated, record=record, options=chosen)


def test_labels_reach_the_pairs_of_training(tmp_path, data) -> None:
    number, report = labels_of(tmp_path / "out", data, [Scores(tmp_path / "notes")])
    assert number == report["labels"] == NUM_PAIRS - 2
    assert (report["unreadable_pairs"], report["unscored_images"]) == (1, {"bright": 1})
    labelled = data.model_copy(update={"labels": str(tmp_path / "out" / "labels.parquet")})
    source = open_source(labelled, say=lambda line: None, in_file_order=True)
    assert source.counts["dropped_unlabelled"] == 2
    is_brighter = [margin > 0 for margin in expected_margins(data) if not np.isnan(margin)]
    assert [source.read(index).image_numbers[0] == 0 for index in range(len(source))] == is_brighter
    expected = [margin > 0 for margin in expected_margins(data)]
    compared = [number for number in range(NUM_PAIRS) if number not in (2, TORN, NO_PROMPT)]
    share = np.mean([expected[number] == bool(number % 2) for number in compared])
    assert report["agreement_with_human_labels"]["bright"]["accuracy"] == pytest.approx(share)
    text = report_text(report)
    assert "10 labels of 12 pairs, 0 of them ties" in text
    assert "1 pairs cannot be read" in text
    json.dumps(report, allow_nan=False)


def test_other_options_write_other_labels_and_score_nothing_again(tmp_path, data) -> None:
    out, notes = tmp_path / "out", tmp_path / "notes"
    labels_of(out, data, [Scores(notes)])
    before = notes.read_text()
    number, report = labels_of(out, data, [Scores(notes)], human="keep")
    assert (number, notes.read_text()) == (NUM_PAIRS - 1, before)  # pair 7 has a human label, pair 9 has no prompt
    kept = pq.read_table(out / "labels.parquet")["label"].to_pylist()
    human = [float(number % 2) for number in range(NUM_PAIRS) if number != NO_PROMPT]
    assert [label for place, label in enumerate(kept) if place != 2] == [*human[:2], *human[3:]]
    agreement = report["agreement_with_human_labels"]["bright"]
    assert agreement["accuracy"] < 1  # of the scorer, not of the labels that were kept
    with pytest.raises(ConfigError, match="scorer bright cannot be calibrated on human labels: 9 pairs have"):
        labels_of(out, data, [Scores(notes)], calibration="temperature")
    changed = r"holds a set of scores that was begun with other settings:\n.*scorers\.dark\.kind: the set of scores has"
    with pytest.raises(ConfigError, match=changed):
        labels_of(out, data, [Scores(notes, name="dark")])


@pytest.mark.parametrize("dies_at", [0, 1, 2, 4, 6])
def test_a_killed_scoring_goes_on_and_ends_alike(tmp_path, data, dies_at) -> None:
    whole, killed, notes = tmp_path / "whole", tmp_path / "killed", tmp_path / "notes"
    labels_of(whole, data, [Scores(tmp_path / "once")])

    def run():
        labels_of(killed, data, [Scores(notes, dies_at=dies_at)])

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    labels_of(killed, data, [Scores(notes)])
    assert (killed / "labels.parquet").read_bytes() == (whole / "labels.parquet").read_bytes()
    assert json.loads((killed / "scores.json").read_text()) == json.loads((whole / "scores.json").read_text())
    # a unit has at most 10 images: no finished unit is scored again
    assert len(notes.read_text().splitlines()) <= DISTINCT - 1 + 10
