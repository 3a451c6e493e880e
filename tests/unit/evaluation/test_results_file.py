import dataclasses
import json
import os
from pathlib import Path

import pytest
from made_evaluation import made_results

from ds_dpo.errors import DataError
from ds_dpo.evaluation.results_file import load_results, save_results


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = made_results(None, prompts=["a cat </script>\u2028", "ein Hund"], models=("base", "dpo", "sft"))
    assert save_results(results, tmp_path) == tmp_path / "results.json"
    assert load_results(tmp_path) == results
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_score_that_is_no_number_is_read_as_none(tmp_path: Path) -> None:
    results = made_results(None, prompts=["a cat"])
    odd = dataclasses.replace(results.images[0], scores={"clip": float("nan")})
    save_results(dataclasses.replace(results, images=[odd]), tmp_path)
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert load_results(tmp_path).images[0].scores == {"clip": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-40], "is no results of an evaluation: the file: Invalid JSON"),
        (lambda text: "[1]", "is no results of an evaluation: the file"),
        (lambda text: text.replace('"n": 100', '"n": "many"'), "comparisons.0.n"),
        (
            lambda text: text.replace('"model": "tuned",\n   "prompt"', '"model": "other",\n   "prompt"'),
            "model 'other'",
        ),
        (lambda text: text.replace('"prompt": 0', '"prompt": 7'), "of prompt 7; the file has 1 prompts"),
        (lambda text: text.replace("images/base", "../base"), "has path '../base/00000_0.png'"),
        (lambda text: text.replace("images/base", "/base"), "has path '/base/00000_0.png'"),
    ],
)
def test_damaged_results_end_in_one_line(tmp_path: Path, change, words: str) -> None:
    path = save_results(made_results(None, prompts=["a cat"]), tmp_path)
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(DataError) as raised:
        load_results(tmp_path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_says_what_would_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json does not exist; a folder that scripts/evaluate\.py wrote"):
        load_results(tmp_path)


def test_the_file_needs_no_more_than_json(tmp_path: Path) -> None:
    path = save_results(made_results(None, prompts=["a cat"]), tmp_path)
    assert json.loads(path.read_text())["images"][0]["path"] == "images/base/00000_0.png"
