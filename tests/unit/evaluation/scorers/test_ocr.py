"""Does the image show the words that the prompt quotes: on rendered words, by the reader that rapidocr ships."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.ocr import quoted_words, share_read
from ds_dpo.evaluation.scorers.opening import open_scorer

WORDS = ("HELLO", "coffee", "OPEN", "Paris", "sale", "MUSIC", "2026", "garden", "Welcome", "STOP")


def opened():
    return open_scorer(ScorerChoice(name="ocr", kind="ocr"), "cpu")


def sign(text: str) -> Image.Image:
    image = Image.new("RGB", (224, 96), "white")
    ImageDraw.Draw(image).text((24, 24), text, fill="black", font=ImageFont.load_default(40))
    return image


def test_rendered_words_are_read() -> None:
    scorer = opened()
    scores = scorer.score([sign(word) for word in WORDS], [f'a sign that says "{word}"' for word in WORDS])
    assert (scores == 1).sum() >= 9
    others = scorer.score(
        [sign("HELLO"), sign("HELLO"), sign("HELLO"), sign("")],
        ['a sign that says "HELLO THERE"', 'a sign that says "quiz"', "a sign that says hello", 'the word "STOP"'],
    )
    assert 0.5 <= others[0] < 1
    assert others[1] <= 0.25
    assert np.isnan(others[2])
    assert others[3] == 0
    assert set(scorer.record["sha256"]) == {"PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a cup with "Good Morning!" on it', ["good", "morning"]),
        ("a sign reading 'don't stop'", ["dont", "stop"]),
        ("the dog's bone and the cat's toy", []),
        ("\u201cCaf\u00e9\u201d above \u00abBAR\u00bb", ["caf\u00e9", "bar"]),
        ('an empty "" and a lone " mark', []),
        ('only marks "?!"', []),
    ],
)
def test_quoted_words_are_found(prompt: str, words: list[str]) -> None:
    assert quoted_words(prompt) == words


@pytest.mark.parametrize(
    ("words", "text", "share"),
    [
        (["hello", "world"], "World, HELLO", 1.0),
        # hello has one wrong letter; of world only the l is there
        (["hello", "world"], "hallo", 1 - (1 + 4) / 10),
        (["stop"], "", 0.0),
        (["ab"], "xyz", 0.0),
        (["abc"], "xxabxcxx", 2 / 3),
    ],
)
def test_the_share_counts_edits_at_the_best_place(words: list[str], text: str, share: float) -> None:
    assert share_read(words, text) == pytest.approx(share)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ScorerError, match=r"package rapidocr .* pip install 'ds_dpo\[eval\]'"):
        opened()
