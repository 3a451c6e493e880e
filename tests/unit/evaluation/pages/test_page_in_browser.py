"""The page of an evaluation in a headless Chromium, opened from a file as a user does: summary, gallery, open pairs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from browser import ENTER, ESCAPE, NASTY, RIGHT, open_page
from made_evaluation import made_results

pytestmark = pytest.mark.slow
NUM_PROMPTS = 3200


def test_the_summary_shows_intervals_plots_and_warnings(driver: tuple[Any, Path], tmp_path: Path) -> None:
    results = made_results(tmp_path, prompts=["a cat", NASTY], models=("base", "dpo", "sft"))
    page = open_page(driver, tmp_path, results)
    assert page.text("#summary h2") == "sft against base"
    assert page.texts("#summary .big") == ["62.5\u202f% 50.0\u202f% to 75.0\u202f%"] * 2
    assert page.run("return document.querySelectorAll('.scorer svg').length") == 4
    assert "clip and brisque disagree" in page.text(".warnings")
    row = page.texts("#comparisons tbody tr:first-child td")
    assert row[:8] == ["sft", "base", "clip", "made", "all", "100", "62.5\u202f%", "50.0\u202f% to 75.0\u202f%"]
    assert row[9:] == ["+0.250", "\u22120.125 to +0.500", "0.063", "0.125", "321"]
    assert len(page.texts("#comparisons tbody tr")) == 4
    # a comparison that was made the other way is turned around
    page.choose("against", 2)
    assert page.text("#summary h2") == "base against sft"
    assert page.texts("#summary .big")[0] == "37.5\u202f% 25.0\u202f% to 50.0\u202f%"
    # people's votes are a comparison of a scorer that gives no scores
    human = dataclasses.replace(results.comparisons[0], scorer="human", win_rate=0.75, prompts_needed=None)
    page = open_page(driver, tmp_path, dataclasses.replace(results, comparisons=[*results.comparisons, human]))
    assert page.texts("#summary .big")[-1].startswith("75.0")
    assert page.run("return document.querySelectorAll('[data-scorer=human] svg').length") == 1
    page.press("?")
    assert "flip between both images" in page.text("#help")
    page.press(ESCAPE)
    assert page.complaints() == []


def test_the_gallery_of_3200_pairs_filters_and_sorts(driver: tuple[Any, Path], tmp_path: Path) -> None:
    names = [f"a picture of number {number}" for number in range(NUM_PROMPTS)]
    names[77] = f"{NASTY} and a zebra"
    results = made_results(tmp_path, prompts=names, pixels=2)
    page = open_page(driver, tmp_path, results)
    page.press("2")
    count = "return document.querySelectorAll('*').length"
    assert page.text("#found") == "3,200 pairs"
    assert page.run(count) < 1000
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    page.wait(f"return document.querySelector('.pair[data-at=\"{NUM_PROMPTS - 1}\"]') !== null")
    assert page.run(count) < 1000
    page.run("window.scrollTo(0, 0)")
    page.wait("return document.querySelector('.pair[data-at=\"0\"]') !== null")

    def leads(scorer: str) -> list[float]:
        """By prompt: how far tuned is ahead of base."""
        sign = -1 if scorer == "brisque" else 1
        of = {(image.model, image.prompt): image.scores[scorer] or 0 for image in results.images}
        return [sign * (of["tuned", place] - of["base", place]) for place in range(NUM_PROMPTS)]

    def first_badge() -> float:
        return float(page.text('.pair[data-at="0"] .badge').replace("\u2212", "-"))

    for scorer, name in enumerate(("clip", "brisque")):
        page.choose("scorer", scorer)
        for order, expected in (("ahead", max(leads(name))), ("behind", min(leads(name))), ("close", None)):
            page.choose("order", order)
            least = min(map(abs, leads(name)))
            assert first_badge() == expected if expected is not None else abs(first_badge()) == least
    page.choose("scorer", 0)
    for field, value, expected in (
        ("winner", -1, NUM_PROMPTS // 5),
        ("agreement", "no", NUM_PROMPTS // 10),  # of those, the ones at odd prompts
        ("category", 0, 0),
        ("category", 1, NUM_PROMPTS // 10),
    ):
        page.choose(field, value)
        assert page.text("#found").split()[0] == f"{expected:,}"
    for field in ("winner", "agreement", "category"):
        page.choose(field, "")
    page.choose("search", "zebra NUMBER")
    assert page.text("#found").startswith("0 of")
    page.choose("search", "Zebra")
    assert page.text("#found") == "1 of 3,200 pairs"
    assert page.text(".pair .prompt") == names[77]
    assert page.run("return window.ran") is None
    page.wait("return [...document.querySelectorAll('.pair img')].every((image) => image.naturalWidth === 2)")

    page.choose("search", "")
    page.press(ESCAPE)
    page.run("document.activeElement.blur()")
    page.press(RIGHT, ENTER)
    assert page.text("#viewer-place") == "2 of 3,200"
    page.press(RIGHT, "s")
    assert page.text("#viewer-place") == "3 of 3,200"
    assert page.run("return document.getElementById('stage').className") == "stage slider"
    for split in ("100%", "0%"):
        page.press(" ")
        assert page.run("return document.getElementById('stage').style.getPropertyValue('--split')") == split
    page.press("+", "+")
    assert page.text("#zoom-factor").startswith("2.3")
    page.press(ESCAPE)
    assert page.run("return document.getElementById('viewer').open") is False
    assert page.complaints() == []


def test_a_missing_image_is_said_in_its_place(driver: tuple[Any, Path], tmp_path: Path) -> None:
    results = made_results(tmp_path, prompts=["a cat", "a dog"])
    (tmp_path / results.images[0].path).unlink()
    page = open_page(driver, tmp_path, results)
    page.press("2")
    page.wait("return document.querySelectorAll('.missing').length === 1")
    assert page.text(".missing") == "This image is missing."


def test_one_model_alone_shows_its_images(driver: tuple[Any, Path], tmp_path: Path) -> None:
    results = made_results(tmp_path, prompts=["a cat", "a dog"], models=("base",))
    image = dataclasses.replace(results.images[1], scores={"clip": 25, "brisque": 40})
    page = open_page(driver, tmp_path, dataclasses.replace(results, images=[results.images[0], image]))
    assert page.text("#summary h2") == "base"
    assert page.texts("#summary .big") == ["22.50 mean score", "35.00 mean score"]
    page.press("2")
    for scorer, first in ((0, "a dog"), (1, "a cat")):  # of brisque, the lower score is the better one
        page.choose("scorer", scorer)
        assert page.texts(".pair .prompt")[0] == first
    page.press("3", ENTER)  # there is no rival to vote on
    assert page.run("return document.getElementById('blind').hidden")
    assert page.complaints() == []
