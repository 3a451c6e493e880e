"""Does the image show the words that its prompt quotes? Text is read by rapidocr, which ships its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.errors import ScorerError, cut
from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.extras import require_packages
from ds_dpo.evaluation.scorers.settings import Settings, settings_of
from ds_dpo.evaluation.scorers.weights import record_of

PACKAGES = ("rapidocr", "onnxruntime", "opencv-python-headless", "numpy")
# by default it enlarges each image until its smaller side has 736 pixels, which takes 20 times as long at 224
LARGEST = {"Det.limit_type": "max", "Det.limit_side_len": 960}
# in straight, curly or angle quotes; an apostrophe inside a word, as in don't, quotes nothing
QUOTED = re.compile(
    r"\"([^\"]*)\"|\u201c([^\u201d]+)\u201d|\u00ab([^\u00bb]+)\u00bb|\u2018([^\u2019]+)\u2019|(?<!\w)'([^']+(?:'\w[^']*)*)'(?!\w)"
)


class OcrScore:
    """1 - (characters that are wrong or missing) / (characters of the quoted words), each word where it fits best.

    Letters and digits count, in any case and any order of words. NaN for a prompt that quotes nothing. Close to the
    reward of Flow-GRPO, https://arxiv.org/abs/2505.05470. It is computed on the host.
    """

    higher_is_better = True

    def __init__(self, choice: ScorerChoice, device: str) -> None:
        self.name = choice.name
        self.images_at_once = settings_of(choice, Settings).images_at_once
        package, _ = require_packages(choice.name, "rapidocr", "onnxruntime")
        self._reader = self._open(package)
        weights = sorted((Path(str(package.__file__)).parent / "models").glob("PP-OCR*.onnx"))
        self.record = record_of(choice, weights=weights, packages=PACKAGES)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        return score_in_batches(images, prompts, self._score, at_once=self.images_at_once)

    def read(self, image: Image.Image) -> str:
        """Return the text of an image. Raises ScorerError."""
        blue_first = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # OpenCV's order of colours
        try:
            return " ".join(self._reader(blue_first).txts or ())
        except Exception as error:  # OpenCV and onnxruntime raise each their own
            raise ScorerError(
                f"scorer {self.name}: rapidocr fails ({type(error).__name__}: {cut(str(error))})"
            ) from error

    def _score(self, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
        wanted = [quoted_words(prompt) for prompt in prompts]
        return np.array(
            [
                share_read(words, self.read(image)) if words else float("nan")
                for image, words in zip(images, wanted, strict=True)
            ]
        )

    def _open(self, package: Any) -> Any:
        threads = os.environ.get("OMP_NUM_THREADS", "")  # onnxruntime would take all cores on each rank
        options: dict[str, Any] = {"Global.log_level": "critical", "Global.use_cls": False, **LARGEST}
        if threads.isdecimal():
            options["EngineConfig.onnxruntime.intra_op_num_threads"] = int(threads)
        try:
            return package.RapidOCR(params=options)
        except Exception as error:
            raise ScorerError(
                f"scorer {self.name}: rapidocr cannot load its models ({type(error).__name__}: {cut(str(error))}); "
                "install it again"
            ) from error


def quoted_words(prompt: str) -> list[str]:
    """Return the words that a prompt quotes, letters and digits in lower case; those of no letter are left out."""
    phrases = [next((part for part in found if part), "") for found in QUOTED.findall(prompt)]
    return [plain for phrase in phrases for word in phrase.split() if (plain := _plain(word))]


def share_read(words: Sequence[str], text: str) -> float:
    """Return the share of the words' characters that a text has, each word compared with its best place."""
    whole = _plain(text)
    wrong = sum(_fewest_edits(word, whole) for word in words)
    return 1 - wrong / sum(map(len, words))


def _plain(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _fewest_edits(word: str, text: str) -> int:
    """Return the edit distance of a word to the part of a text that is nearest to it (Sellers, 1980)."""
    row = [0] * (len(text) + 1)  # a part may begin anywhere
    for number, letter in enumerate(word, 1):
        above, row = row, [number]
        for place, other in enumerate(text):
            row.append(min(above[place] + (letter != other), above[place + 1] + 1, row[place] + 1))
    return min(row)
