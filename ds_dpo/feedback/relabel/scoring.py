"""Score the images and pairs of a unit: each distinct image once for each of its prompts, decoded ahead by workers.

Legend: a place is 2 * pair for a pair's lower image and 2 * pair + 1 for its higher one; pairs count in file order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.data.images import decode_rgb
from ds_dpo.data.source import BadRowError, PairSource
from ds_dpo.encoding.cache.scan import Distinct, find_distinct
from ds_dpo.encoding.cache.shard_file import new_shard
from ds_dpo.errors import DataError
from ds_dpo.evaluation.scorers.scorer import PairJudge, Scorer
from ds_dpo.making.tasks import run_tasks

IMAGES_OF_TASK = 8  # even: a pair's two places are in one task


def column_of(name: str) -> str:
    """Return the column of a scorer, which no other column has, whatever the scorer is called."""
    return f"score_{name}"


@dataclass(frozen=True, kw_only=True)
class ScannedPairs:
    """All pairs of a scan in file order.

    table: of SCAN_SCHEMA. images: the distinct ones among pairs of an image and its prompt, at their places.
    """

    table: pa.Table
    images: Distinct


def scanned_pairs(table: pa.Table) -> ScannedPairs:
    """Find the distinct images, each with its prompt, of the scans of all units, joined."""
    table = table.combine_chunks()
    is_chosen_lower = np.asarray(table["chosen_is_lower"].fill_null(True))
    chosen, rejected = (table[f"{side}_key"].to_pylist() for side in ("chosen", "rejected"))
    keys: list[bytes | None] = []
    for prompt, first, second, is_first_lower in zip(
        table["prompt_key"].to_pylist(), chosen, rejected, is_chosen_lower, strict=True
    ):
        if prompt is None:
            keys += [None, None]
        else:
            keys += [prompt + first, prompt + second] if is_first_lower else [prompt + second, prompt + first]
    return ScannedPairs(table=table, images=find_distinct(pa.array(keys, pa.binary(32))))


@dataclass(frozen=True)
class Decoded:
    """Images of a task, in its order; None for one that cannot be decoded. prompts: of these images."""

    images: list[Image.Image | None]
    prompts: list[str]


@dataclass(frozen=True)
class _Decoder:
    """Reads images by (index of the pair in the source, whether it is the lower image)."""

    source: PairSource

    def __call__(self, wanted: Sequence[tuple[int, bool]]) -> Decoded:
        images: list[Image.Image | None] = []
        prompts: list[str] = []
        for index, is_lower in wanted:
            image, prompt = self._read(index, is_lower)
            images.append(image)
            prompts.append(prompt)
        return Decoded(images, prompts)

    def _read(self, index: int, is_lower: bool) -> tuple[Image.Image | None, str]:
        try:
            record = self.source.read(index)
        except BadRowError:
            return None, ""
        is_chosen = is_lower == (record.image_numbers[0] < record.image_numbers[1])
        try:
            return decode_rgb(record.chosen if is_chosen else record.rejected), record.prompt
        except DataError:
            return None, record.prompt


def decoded(
    source: PairSource, places: Sequence[int], scan: ScannedPairs, *, workers: int
) -> Iterator[tuple[Sequence[int], Decoded]]:
    """Yield the images at places, in order, a task at a time."""
    index_of_pair = scan.table["index"].to_numpy()
    tasks = [places[start : start + IMAGES_OF_TASK] for start in range(0, len(places), IMAGES_OF_TASK)]
    wanted = [[(int(index_of_pair[place // 2]), place % 2 == 0) for place in task] for task in tasks]
    yield from zip(tasks, run_tasks(_Decoder(source), wanted, workers=workers), strict=True)


def score_images(
    path: Path,
    places: Sequence[int],
    scan: ScannedPairs,
    *,
    source: PairSource,
    scorers: Sequence[Scorer],
    workers: int,
) -> None:
    """Write the scores of the images at places, a row each: place, and a column for each scorer, NaN for no score."""
    schema = pa.schema([("place", pa.int64()), *((column_of(scorer.name), pa.float64()) for scorer in scorers)])
    at_once = max(scorer.images_at_once for scorer in scorers)
    with new_shard(path, schema) as shard:
        for batch in _batches(decoded(source, places, scan, workers=workers), at_once=at_once):
            _write_scores(batch, scorers, shard.rows.add)


class _Batch:
    """Images that are scored together, and the places of those that cannot be decoded."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.images: list[Image.Image] = []
        self.prompts: list[str] = []
        self.broken: list[int] = []

    def add(self, places: Sequence[int], found: Decoded) -> None:
        for place, image, prompt in zip(places, found.images, found.prompts, strict=True):
            if image is None:
                self.broken.append(place)
                continue
            self.places.append(place)
            self.images.append(image)
            self.prompts.append(prompt)


def _batches(tasks: Iterable[tuple[Sequence[int], Decoded]], *, at_once: int) -> Iterator[_Batch]:
    """Yield tasks joined to batches of at_once images or a few more, the last one smaller."""
    batch = _Batch()
    for places, found in tasks:
        batch.add(places, found)
        if len(batch.places) >= at_once:
            yield batch
            batch = _Batch()
    yield batch


def _write_scores(batch: _Batch, scorers: Sequence[Scorer], add: Callable[[Mapping[str, Any]], None]) -> None:
    scores = {column_of(scorer.name): _in_parts(scorer, batch) for scorer in scorers}
    for number, place in enumerate(batch.places):
        add({"place": place, **{name: float(values[number]) for name, values in scores.items()}})
    for place in batch.broken:
        add({"place": place, **dict.fromkeys(scores, float("nan"))})


def _in_parts(scorer: Scorer, batch: _Batch) -> NDArray[np.float64]:
    size = scorer.images_at_once
    parts = [
        scorer.score(batch.images[start : start + size], batch.prompts[start : start + size])
        for start in range(0, len(batch.images), size)
    ]
    return np.concatenate([np.empty(0), *parts])


def judge_pairs(
    path: Path,
    pairs: range,
    scan: ScannedPairs,
    *,
    source: PairSource,
    judges: Sequence[PairJudge],
    workers: int,
) -> None:
    """Write each judge's probability that a pair's lower image is better, a row for each pair; NaN for no answer.

    A judge sees each pair in both orders, and the mean counts, because judges favour the first or the second image.
    """
    schema = pa.schema([("pair", pa.int64()), *((column_of(judge.name), pa.float64()) for judge in judges)])
    at_once = max(judge.images_at_once for judge in judges)
    places = [place for pair in pairs for place in (2 * pair, 2 * pair + 1)]
    with new_shard(path, schema) as shard:
        # a task holds whole pairs, and so does a batch
        for batch in _batches(decoded(source, places, scan, workers=workers), at_once=at_once):
            _write_judgements(batch, judges, shard.rows.add)


def _write_judgements(batch: _Batch, judges: Sequence[PairJudge], add: Callable[[Mapping[str, Any]], None]) -> None:
    number_of = {place: number for number, place in enumerate(batch.places)}
    pairs = sorted({place // 2 for place in (*batch.places, *batch.broken)})
    whole = [pair for pair in pairs if 2 * pair in number_of and 2 * pair + 1 in number_of]
    lower = [batch.images[number_of[2 * pair]] for pair in whole]
    higher = [batch.images[number_of[2 * pair + 1]] for pair in whole]
    prompts = [batch.prompts[number_of[2 * pair]] for pair in whole]
    found = {column_of(judge.name): _both_orders(judge, lower, higher, prompts) for judge in judges}
    for number, pair in enumerate(whole):
        add({"pair": pair, **{name: float(values[number]) for name, values in found.items()}})
    for pair in sorted(set(pairs) - set(whole)):
        add({"pair": pair, **dict.fromkeys(found, float("nan"))})


def _both_orders(
    judge: PairJudge, lower: list[Image.Image], higher: list[Image.Image], prompts: list[str]
) -> NDArray[np.float64]:
    size = max(1, judge.images_at_once // 2)
    parts = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        there = judge.prefer(lower[part], higher[part], prompts[part])
        back = judge.prefer(higher[part], lower[part], prompts[part])
        parts.append((there + 1 - back) / 2)
    return np.concatenate([np.empty(0), *parts])
