"""Blind votes on the page of an evaluation in a headless Chromium: by keyboard, kept, exported, trained on."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import forked
import pytest
from browser import BACKSPACE, LEFT, NASTY, RIGHT, UP, Page, open_page
from made_evaluation import made_results
from made_votes import vote_file, vote_row
from repository import ROOT

from ds_dpo.config.load import load_config
from ds_dpo.data.reading.run_pairs import open_trained_on
from ds_dpo.evaluation.votes.human import human_comparisons

pytestmark = [pytest.mark.slow, pytest.mark.launch]


def start_session(page: Page, *, rater: str, pairs: int) -> None:
    page.press("3")
    for name, value in (("rater", rater), ("vote-number", pairs), ("vote-seed", 7)):
        page.choose(name, value)
    page.click("#setup button.main")


def vote(page: Page, place: int, key: str) -> None:
    page.wait("return document.body.dataset.ready === arguments[0]", str(place))
    page.press(key)


def test_blind_votes_by_keyboard_are_kept_exported_and_trained_on(driver: tuple[Any, Path], tmp_path: Path) -> None:
    prompts = [f"a {colour} circle" for colour in ("red", "blue", "green", "white", "black", "yellow")] * 2
    prompts = [f"{prompt} {NASTY if place == 3 else place}" for place, prompt in enumerate(prompts)]
    results = made_results(tmp_path, prompts=prompts, pixels=32)
    page = open_page(driver, tmp_path, results)
    page.run("localStorage.clear()")
    start_session(page, rater="Änne <b>", pairs=10)
    # models are hidden: no element of the ballot names one, and none of the page names an image
    assert page.run("return document.querySelectorAll('img').length") == 0
    ballot = page.run("return document.getElementById('blind').outerHTML")
    assert not [name for name in ("tuned", "base", ".png") if name in ballot]
    for place, key in enumerate([LEFT, RIGHT, UP, LEFT]):
        vote(page, place, key)
    page.wait("return document.body.dataset.ready === '4'")
    page.press(BACKSPACE)
    assert page.text("#vote-place") == "4 of 10"
    page.open()  # progress is kept
    page.press("3")
    assert "3 of 10 pairs" in page.text(".sessions li")
    page.click(".sessions li button:not(.quiet)")
    for place in range(3, 10):
        vote(page, place, LEFT)
    assert page.text("#result p").startswith("10 votes of Änne <b>, seed 7")
    page.click("#export")
    path = page.downloads / "votes-Änne_b_.jsonl"
    wait_for(page, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["image_0"] for row in rows}) == 10
    assert list(rows[0]) == list(vote_row(results, 0, 1))  # so tests without a browser have rows as the page exports
    for row in rows:
        keys = {0: LEFT, 1: RIGHT, 2: UP}
        left_wins = 1.0 if row["left"] == "model_0" else 0.0
        expected = {LEFT: left_wins, RIGHT: 1 - left_wins, UP: 0.5}[keys.get(row["place"], LEFT)]
        assert row["label"] == expected
        assert row["outcome"] == {1: "model_0", 0: "model_1", 0.5: "tie"}[expected]
        assert (row["evaluation"], row["rater"], row["shuffle_seed"]) == ("made-evaluation", "Änne <b>", 7)
        assert row["prompt"] == prompts[int(Path(row["image_0"]).name[:5])]
    assert {row["left"] for row in rows} == {"model_0", "model_1"}
    assert [row["place"] for row in rows] == list(range(10))
    assert page.run("return window.ran") is None
    assert page.complaints() == []

    human = human_comparisons(results, [path])
    assert human.raters == {"Änne <b>": 10}
    assert human.left_out == []
    shown = page.text("#result .big").split("\u202f")[0]
    assert float(shown) == pytest.approx(100 * human.comparisons[0].win_rate, abs=0.05)
    for row, agreement in zip(page.texts("#with-scorers tbody tr"), human.with_scorers, strict=True):
        assert row.startswith(f"{agreement.one}{agreement.n}{100 * (agreement.same or 0):.1f}")

    train_one_step(path.rename(tmp_path / "votes.jsonl"), tmp_path, num_pairs=9)


def wait_for(page: Page, path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page.driver, 30, poll_frequency=0.05).until(lambda _: path.is_file())


def train_one_step(votes: Path, folder: Path, *, num_pairs: int) -> None:
    """Train on votes that are beside their evaluation's images; a tie is left out."""
    options = [
        "--config=miniature",
        "--data.format=manifest",
        f"--data.dataset={votes}",
        f"--output_dir={folder / 'run'}",
        "--max_train_steps=1",
        "--schedule.warmup_steps=0",
        "--pairs_per_step=4",
        "--micro_batch_pairs=4",
        "--cadence.sample_every_steps=null",
    ]
    source = open_trained_on(load_config([*options, f"--data.cache_dir={folder / 'cache'}"]).config, say=print)
    assert len(source) == num_pairs
    for index in range(num_pairs):
        record = source.read(index)
        row = next(row for row in map(json.loads, votes.read_text().splitlines()) if row["prompt"] == record.prompt)
        better, worse = ("image_0", "image_1") if row["label"] == 1 else ("image_1", "image_0")
        assert record.chosen == (folder / row[better]).read_bytes()
        assert record.rejected == (folder / row[worse]).read_bytes()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = forked.run([str(ROOT / "ds_dpo" / "train.py"), *options], env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert math.isclose(json.loads(line)["loss"], math.log(2), abs_tol=1e-6)


def test_raters_are_compared_from_their_files(driver: tuple[Any, Path], tmp_path: Path) -> None:
    results = made_results(tmp_path, prompts=[f"prompt {number}" for number in range(12)])
    page = open_page(driver, tmp_path, results)
    page.run("localStorage.clear()")
    start_session(page, rater="Anna", pairs=12)
    for place in range(12):
        vote(page, place, UP if place % 3 == 0 else LEFT)
    page.click("#export")
    own = page.downloads / "votes-Anna.jsonl"
    wait_for(page, own)
    foreign = {**vote_row(results, 0, 1, rater="Ben"), "evaluation": "another"}
    rows = [vote_row(results, prompt, [1, 0.5, 0][prompt % 3], rater="Ben") for prompt in range(9)]
    turned = [vote_row(results, prompt, 0, rater="Cem", models=("base", "tuned")) for prompt in range(12)]
    ben = vote_file(tmp_path / "ben.jsonl", *rows, '{"cut')
    cem = vote_file(tmp_path / "cem.jsonl", *turned)
    page.driver.find_element("id", "import").send_keys(f"{ben}\n{cem}")
    page.wait("return document.querySelectorAll('#between-raters tbody tr').length === 3")
    human = human_comparisons(results, [own, ben, cem])
    own.unlink()
    for row, between in zip(page.texts("#between-raters tbody tr"), human.between_raters, strict=True):
        assert between.kappa is not None
        same = f"{100 * (between.same or 0):.1f}\u202f%"
        found = row.replace("\u2212", "-")
        assert found.startswith(f"{between.one} and {between.other}{between.n}{same}")
        assert float(found.rpartition("%")[2]) == pytest.approx(between.kappa, abs=6e-4)
    assert human.fleiss_kappa is not None
    fleiss = page.text("#between-raters").replace("\u2212", "-") + page.text("#result").replace("\u2212", "-")
    assert f"over {human.fleiss_pairs} pairs with two votes or more" in fleiss
    assert "ben.jsonl: left out 1 row damaged" in page.text("#result")
    whole = next(each for each in human.comparisons if each.category is None)
    assert float(page.text("#result .big").split("\u202f")[0]) == pytest.approx(100 * whole.win_rate, abs=0.05)
    page.driver.find_element("id", "import").send_keys(str(vote_file(tmp_path / "dan.jsonl", foreign)))
    page.wait(
        "return document.getElementById('result').textContent.includes('dan.jsonl: left out 1 row of other models')"
    )
    assert page.complaints() == []


def test_a_session_survives_more_prompts_and_changed_images(driver: tuple[Any, Path], tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(8)]
    results = made_results(tmp_path, prompts=prompts)
    page = open_page(driver, tmp_path, results)
    page.run("localStorage.clear()")
    start_session(page, rater="Anna", pairs=8)
    for place in range(4):
        vote(page, place, LEFT)
    page.click("#stop")
    page.click("#export")
    path = page.downloads / "votes-Anna.jsonl"
    wait_for(page, path)
    before = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    # the same evaluation with more prompts and one more model; the image of the second vote has changed
    more = made_results(tmp_path, prompts=[*prompts, "one more", "and one more"], models=("base", "other", "tuned"))
    hashes = {image.path: image.sha256 for image in results.images} | {before[1]["image_0"]: "0" * 64}
    images = [dataclasses.replace(image, sha256=hashes.get(image.path, image.sha256)) for image in more.images]
    page = open_page(driver, tmp_path, dataclasses.replace(more, images=images))
    page.press("3")
    assert "3 of 7 pairs" in page.text(".sessions li")
    page.click(".sessions li button:not(.quiet)")
    vote(page, 3, UP)
    page.click("#stop")
    page.click("#export")
    wait_for(page, path)
    after = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [before[0], *before[2:]]
    for name in ("prompt", "image_0", "image_1", "label", "left"):
        assert [row[name] for row in after[:3]] == [row[name] for row in kept]
    assert (len(after), after[3]["label"]) == (4, 0.5)
    path.unlink()
    assert page.complaints() == []
