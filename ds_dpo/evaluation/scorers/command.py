"""Any program as a scorer: it reads JSON lines and writes JSON lines, and keeps running from batch to batch."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.errors import ScorerError, cut, shown
from ds_dpo.evaluation.scorers.asking import AskingJudge, AskingScorer, AskingSettings, Question, asking, number_of
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.program import Program, ProgramEndedError, ProgramSilentError
from ds_dpo.evaluation.scorers.settings import settings_of
from ds_dpo.evaluation.scorers.weights import record_of
from ds_dpo.outside import parse_json

DEVICE_VARIABLE = "DS_DPO_SCORER_DEVICE"


class CommandSettings(AskingSettings):
    """A program that compares pairs knows best how to ask its model, so each pair is asked once by default."""

    both_orders: bool = False
    timeout_seconds: float = 600.0  # the first answer waits until its model is loaded


def open_command(choice: ScorerChoice, device: str) -> AskingScorer | AskingJudge:
    """Start the program of a choice. Raises ScorerError if it cannot be started.

    Each line that it reads is {"image": path of a PNG, "prompt": text, "left": lines of this batch that follow}, for
    pairs with "rival" too. For each one it writes {"score": number}, or {"preference": 0..1}, in the same order;
    null is no number. The environment variable DS_DPO_SCORER_DEVICE names the device.
    """
    settings = settings_of(choice, CommandSettings)
    words = _words(choice)
    try:
        program = Program(words, environment={**os.environ, DEVICE_VARIABLE: device})
    except OSError as error:
        raise ScorerError(
            f"scorer {choice.name}: the program {shown(words[0])} cannot be started ({error.strerror}); give the path "
            "of a program that may be executed, or `python FILE`"
        ) from error
    files = [path for word in words if (path := Path(word)).is_file()]
    record = record_of(choice, weights=files, packages=(), settings=settings.identity())
    asked = _Conversation(choice.name, program, settings)
    return asking(name=choice.name, settings=settings, record=record, ask=asked.ask)


def _words(choice: ScorerChoice) -> list[str]:
    assert choice.source is not None  # the table demands one
    try:
        words = shlex.split(choice.source)
    except ValueError as error:
        raise ScorerError(
            f"scorer {choice.name}: the command {shown(choice.source)} cannot be read ({error}); quote it as in a shell"
        ) from error
    if not words:
        raise ScorerError(f"scorer {choice.name}: the command {shown(choice.source)} is empty")
    return words


class _Conversation:
    """Writes questions to the program, and reads its answers."""

    def __init__(self, name: str, program: Program, settings: CommandSettings) -> None:
        self._name = name
        self._program = program
        self._settings = settings
        self._key = "preference" if settings.pairwise else "score"
        weakref.finalize(self, program.stop)

    def ask(self, questions: Sequence[Question]) -> NDArray[np.float64]:
        # the program may read an image at any time until it has answered for it
        with tempfile.TemporaryDirectory(prefix="ds_dpo_scorer_") as folder:
            lines = [
                self._line(Path(folder), place, question, left=len(questions) - 1 - place)
                for place, question in enumerate(questions)
            ]
            self._program.write("".join(lines))
            return np.array([self._answer(place, len(lines)) for place in range(len(lines))], dtype=np.float64)

    def _line(self, folder: Path, place: int, question: Question, *, left: int) -> str:
        paths = [folder / f"{place}_{side}.png" for side in range(len(question.images))]
        for path, image in zip(paths, question.images, strict=True):
            _save(image, path)
        roles = dict(zip(("image", "rival"), map(str, paths), strict=False))
        return json.dumps({**roles, "prompt": question.prompt, "left": left}) + "\n"

    def _answer(self, place: int, total: int) -> float:
        so_far = f"after {place} of {total} answers of a batch"
        try:
            line = self._program.read_line(timeout_seconds=self._settings.timeout_seconds)
        except ProgramSilentError:
            raise self._failed(
                f"gave no answer for {self._settings.timeout_seconds:g} s, {so_far}; mend it, or raise timeout_seconds "
                "in its settings file"
            ) from None
        except ProgramEndedError as error:
            raise self._failed(f"{error}, {so_far}; it must answer each line, and go on until its input ends") from None
        try:
            answer = parse_json(line)
        except ValueError:
            raise self._failed(
                f"answered {shown(line.decode(errors='replace'))}, which is no JSON, {so_far}; it must write one line "
                f'like {{"{self._key}": 1.5}} for each image to its standard output, and all else to standard error'
            ) from None
        try:
            return number_of(answer, key=self._key, place="answered")
        except ScorerError as error:
            raise self._failed(str(error)) from None

    def _failed(self, what: str) -> ScorerError:
        self._program.stop()
        end = self._program.last_words()
        said = f"; the end of its standard error: {cut(end, characters=600)}" if end else ""
        return ScorerError(f"scorer {self._name}: the program {cut(self._program.title)} {what}{said}")


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, compress_level=1)  # read once and deleted
