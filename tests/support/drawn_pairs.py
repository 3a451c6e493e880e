"""Rows of preferences drawn from a seed, and the pairs that they make, found without the code that is tested."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pair_files import file_of, picture

NUM_IMAGES = 48
PROMPTS = ("a cat", "grün, 12", 'two "words"', "12", "a\tb", "日本", "a cat ", "x" * 300)
Layout = Literal["labelled", "ordered", "lists", "grouped"]


@cache
def image_file(number: int) -> bytes:
    """Return image number 0 ... NUM_IMAGES - 1 as a file; every fourth one is wide."""
    return file_of(picture(number, width=40 if number % 4 == 3 else 20, height=16))


TORN = image_file(0)[:100]


@dataclass(kw_only=True)
class Row:
    """A row before it is written.

    images: numbers, two for a labelled or an ordered row. verdicts: the label, or a rank for each image. is_bad: it is
    read, and cannot be used. lacks_image: number of an image whose value is not its file, and that value.
    """

    prompt: str | None
    images: list[int]
    verdicts: list[float | None]
    confidence: float | None
    group: int = 0
    is_bad: bool = False
    odd_image: tuple[int, Any] | None = None


@dataclass(frozen=True)
class Pair:
    """A pair: numbers of its images, and whether it is a tie."""

    prompt: str
    chosen: int
    rejected: int
    target: float


@dataclass(kw_only=True)
class DrawnSet:
    """A set on its way to disk.

    fields: of DataConfig. refusal: words that a refusal must have, none if the set can be read. words: what was done.
    dataset: what to open, once it is written.
    """

    seed: int
    draw: random.Random
    folder: Path
    layout: Layout
    rows: list[Row]
    fields: dict[str, Any]
    refusal: tuple[str, ...] = ()
    words: list[str] = field(default_factory=list)
    dataset: Path = Path()

    @property
    def name(self) -> str:
        return ", ".join([self.layout, *self.words])

    def seeded(self, name: str) -> float:
        """Return a number in [0, 1) that is the same for all files of the set."""
        return random.Random(f"{name} {self.seed}").random()

    def pairs(self) -> list[Pair | None]:
        """Return the pairs by hand, in file order; None for one whose row is bad."""
        rows = self.rows[: self.fields.get("max_rows")]
        found = list(_by_group(rows) if self.layout == "grouped" else _by_row(rows, self.layout))
        limit = self.fields.get("max_pairs_per_prompt")
        kept: list[Pair | None] = []
        number_of: Counter[str | None] = Counter()
        for row, better, worse, is_tie in found:
            confidence, least = row.confidence, self.fields.get("min_confidence")
            if is_tie and self.fields.get("ties", "drop") == "drop":
                continue
            if least is not None and confidence is not None and confidence < least:
                continue
            number_of[row.prompt] += 1
            if limit is not None and number_of[row.prompt] > limit:
                continue
            is_bad = row.is_bad or row.prompt is None or self._meets_odd_image(row, better, worse)
            kept.append(None if is_bad else Pair(str(row.prompt), better, worse, 0.5 if is_tie else 1.0))
        return kept

    def _meets_odd_image(self, row: Row, better: int, worse: int) -> bool:
        return row.odd_image is not None and row.images[row.odd_image[0]] in (better, worse)


def _by_row(rows: Sequence[Row], layout: Layout) -> Iterator[tuple[Row, int, int, bool]]:
    for row in rows:
        if layout == "ordered":
            yield row, row.images[0], row.images[1], False
        elif layout == "labelled":
            label = row.verdicts[0]
            first, second = row.images if label != 0 else reversed(row.images)
            yield row, first, second, label in (None, 0.5)
        else:
            images = [*row.images, *[0] * 9]  # a row of too many ranks is bad
            ranks = [float(rank or 0) for rank in row.verdicts]
            if len(ranks) < 2 and len(row.images) > len(ranks):
                yield row, 0, 0, False
            for left, right in combinations(range(len(ranks)), 2):
                first, second = (left, right) if ranks[left] <= ranks[right] else (right, left)
                yield row, images[first], images[second], ranks[left] == ranks[right]


def _by_group(rows: Sequence[Row]) -> Iterator[tuple[Row, int, int, bool]]:
    for left, row in enumerate(rows):
        for other in rows[left + 1 :]:
            if other.group == row.group:
                first, second = (row, other) if row.verdicts[0] <= other.verdicts[0] else (other, row)
                is_bad = row.is_bad or first.odd_image is not None or second.odd_image is not None
                both = Row(prompt=row.prompt, images=[], verdicts=[], confidence=row.confidence, is_bad=is_bad)
                yield both, first.images[0], second.images[0], row.verdicts[0] == other.verdicts[0]


def draw_set(seed: int, folder: Path, layout: Layout) -> DrawnSet:
    """Return rows and settings; nothing is written yet."""
    draw = random.Random(f"{seed} {layout}")
    number = draw.randrange(5, 12)
    images = iter(draw.sample(range(NUM_IMAGES), NUM_IMAGES))
    rows = []
    for place in range(number):
        count = {"lists": draw.randrange(1, 4), "grouped": 1}.get(layout, 2)
        verdicts: list[float | None] = [draw.choice([1, 0, 1, 0, 0.5, None])]
        if layout in ("lists", "grouped"):
            verdicts = [draw.choice([1, 2, 2.5, 3]) for _ in range(count)]
        rows.append(
            Row(
                prompt=draw.choice(PROMPTS),
                images=[next(images) for _ in range(count)],
                verdicts=verdicts,
                confidence=draw.choice([None, 0.25, 0.5, 1.0]),
                group=draw.randrange(4) if place else 0,
            )
        )
    if layout == "labelled":
        rows[0].verdicts = [1.0]  # at least one pair is decided
    if layout == "lists":
        rows[0].images, rows[0].verdicts = [next(images), next(images)], [2, 1]
    if layout == "grouped":
        rows[1].group, rows[0].verdicts, rows[1].verdicts = 0, [1], [3]
    fields: dict[str, Any] = {}
    for name, values in (("ties", ["drop", "soft"]), ("max_rows", [3, 5]), ("max_pairs_per_prompt", [1, 2])):
        if draw.random() < 0.25:
            fields[name] = draw.choice(values)
    if draw.random() < 0.2:
        fields["confidence"] = draw.choice(["weight", "target"])
    if draw.random() < 0.15:
        fields["min_confidence"] = 0.25
    if draw.random() < 0.15:
        fields |= {"aspect_buckets": True, "bucket_step": 8}
    return DrawnSet(seed=seed, draw=draw, folder=folder, layout=layout, rows=rows, fields=fields)
