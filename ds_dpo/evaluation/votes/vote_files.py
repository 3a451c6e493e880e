"""Read vote files: JSON lines that an evaluation's page exports, each of them one vote of one rater on one pair.

A row is at the same time a row of a preference file: prompt, image_0, image_1, and label, which is 1 if image 0 is the
better one, 0 if image 1 is, 0.5 for a tie. See docs/evaluation_page.md for all columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.errors import DataError, shown
from ds_dpo.evaluation.results import ImageRow, Results
from ds_dpo.outside import parse_json, read_regular

MAX_BYTES = 2**28  # a vote takes 600 bytes
TEXTS = ("rater", "evaluation", "model_0", "model_1", "image_0", "image_1", "sha256_0", "sha256_1")
LABELS = (0, 0.5, 1)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A vote. images: in the order of their models' labels. label: 1 if the first one is better, 0.5 for a tie, 0."""

    rater: str
    images: tuple[ImageRow, ImageRow]
    label: float

    @property
    def pair(self) -> tuple[str, str]:
        """The paths of both images, which are the same whichever of them the row calls image 0."""
        return self.images[0].path, self.images[1].path


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row that does not count. line: from 1."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Votes:
    """The votes that count, one for each rater and pair, and the rows that do not."""

    votes: Sequence[Vote]
    left_out: Sequence[LeftOut]


def read_votes(results: Results, files: Sequence[Path]) -> Votes:
    """Return the votes of files. The last vote of a rater on a pair counts.

    Raises DataError for a file that cannot be read, is of another evaluation or names a model that it lacks, and if no
    vote is left.
    """
    images = {image.path: image for image in results.images}
    models = {model.label for model in results.models}
    counted: dict[tuple[str, tuple[str, str]], tuple[str, int, Vote]] = {}
    left_out = []
    for file in files:
        for line, text in _lines(file):
            row = _row(text)
            if isinstance(row, Mapping):
                _check_belongs(row, f"{file}, line {line}", results.evaluation, models)
                vote = _vote(row, images)
            else:
                vote = row
            if isinstance(vote, str):
                left_out.append(LeftOut(file=str(file), line=line, reason=vote))
                continue
            key = vote.rater, vote.pair
            if key in counted:
                name, before, _ = counted.pop(key)
                left_out.append(LeftOut(file=name, line=before, reason=f"{vote.rater} votes again on this pair later"))
            counted[key] = str(file), line, vote
    if not counted:
        first = f"; the first row: {left_out[0].reason}" if left_out else ""
        raise DataError(f"{', '.join(map(str, files))}: no vote can be used{first}")
    return Votes(votes=[vote for _, _, vote in counted.values()], left_out=left_out)


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = read_regular(file, max_bytes=MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text; a votes file that an evaluation's page exports would fit"
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _row(line: str) -> Mapping[str, Any] | str:
    """Return the columns of a vote, or why the line is none."""
    try:
        row = parse_json(line)
    except ValueError:
        return "is not JSON: damaged, or cut off"
    if not isinstance(row, dict):
        return f"is {shown(row)}; an object of columns would fit"
    for name in TEXTS:
        if not isinstance(row.get(name), str):
            return f"has {name} {shown(row.get(name))}; a text would fit"
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int | float) or label not in LABELS:
        return f"has label {shown(label)}; 0, 0.5 or 1 would fit"
    return row


def _check_belongs(row: Mapping[str, Any], place: str, evaluation: str, models: set[str]) -> None:
    if row["evaluation"] != evaluation:
        raise DataError(
            f"{place} is a vote of evaluation {shown(row['evaluation'])}, but this one is {shown(evaluation)}; "
            "votes of its own page would fit"
        )
    for name in ("model_0", "model_1"):
        if row[name] not in models:
            raise DataError(
                f"{place}: {name} is {shown(row[name])}, which the evaluation lacks; it has {', '.join(sorted(models))}"
            )


def _vote(row: Mapping[str, Any], images: Mapping[str, ImageRow]) -> Vote | str:
    """Return a vote, or why its images are not those of the evaluation."""
    found = []
    for side in "01":
        image = images.get(row[f"image_{side}"])
        if image is None:
            return f"has image_{side} {shown(row[f'image_{side}'])}, which the evaluation lacks"
        if image.model != row[f"model_{side}"]:
            return f"has image_{side} {shown(image.path)} of model {image.model}, not {shown(row[f'model_{side}'])}"
        if image.sha256 != row[f"sha256_{side}"]:
            return f"has image_{side} {shown(image.path)}, which has changed since the vote"
        found.append(image)
    if (found[0].prompt, found[0].seed) != (found[1].prompt, found[1].seed) or found[0].model == found[1].model:
        return "has two images that are no pair: two models, one prompt and one seed would fit"
    if found[0].model < found[1].model:
        return Vote(rater=row["rater"], images=(found[0], found[1]), label=float(row["label"]))
    return Vote(rater=row["rater"], images=(found[1], found[0]), label=1 - float(row["label"]))
