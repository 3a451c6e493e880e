"""Score the images of an evaluation that have no score yet, each rank its share of the batches."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ds_dpo.data.images import decode_rgb
from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import on_main
from ds_dpo.errors import DataError, ScorerError
from ds_dpo.evaluation.drawing.generate import file_name
from ds_dpo.evaluation.run.drawn_images import DrawnImage
from ds_dpo.evaluation.run.line_log import Line, LineLog, read_lines
from ds_dpo.evaluation.run.pace import Pace
from ds_dpo.evaluation.run.work import Group, batches_of, share_of
from ds_dpo.evaluation.scorers.opening import is_judge
from ds_dpo.evaluation.scorers.scorer import PairJudge, Scorer
from ds_dpo.process.say import Say

SCORES_NAME = "scores"
DIGITS = 10  # of a digest in the name of a folder
DECODED_AHEAD = 3  # batches
NEEDED = ("image", "prompt", "score")
EVEN = 0.5  # a judge's probability if neither image is better


@dataclass(frozen=True)
class Key:
    """What a score depends on beside the scorer. image, rival: SHA-256 of the files; rival is None but for a judge."""

    image: str
    prompt: str
    rival: str | None = None


@dataclass(frozen=True)
class ScoreTask:
    """A score to be given. path, rival_path: files below the evaluation's folder."""

    key: Key
    path: str
    rival_path: str | None = None


Scores = Mapping[Key, float]


def folder_of(scorer: Scorer | PairJudge) -> str:
    """Return the name of the folder of a scorer's scores: another version or other weights have another one."""
    digest = hashlib.sha256(json.dumps(dict(scorer.record), sort_keys=True, default=str).encode()).hexdigest()
    return f"{SCORES_NAME}/{file_name(scorer.name)}-{digest[:DIGITS]}"


def key_of(prompt: str, image: DrawnImage, rival: DrawnImage | None) -> Key:
    """Return what the score of an image depends on. rival: what a judge compares it with."""
    return Key(image.sha256, prompt, None if rival is None else rival.sha256)


def score_missing(
    scorer: Scorer | PairJudge,
    groups: Sequence[Group],
    rivals: Sequence[Group],
    drawn: Mapping[str, DrawnImage],
    *,
    out: Path,
    place: RankEnvironment,
    say: Say,
) -> dict[Key, float]:
    """Return all scores of the groups, after those that are missing were given; the same on all ranks.

    rivals: for each group that of the model compared with. A score that is NaN is asked for again by the next call.
    Raises ScorerError if the scorer fails, DataError if an image cannot be decoded.
    """
    folder = out / folder_of(scorer)
    # a rank that read for itself could read what a faster one has scored by then, and would share out another list
    found = on_main(lambda: _read(folder, say=say))
    batches = _batches(scorer, groups, rivals, drawn)
    missing = [batch for batch in batches if any(math.isnan(found.get(task.key, math.nan)) for task in batch)]
    num_scores = sum(map(len, batches))
    if not missing:
        say(f"{scorer.name}: all {num_scores} scores are there")
        return found
    start = time.perf_counter()
    lines = _score_batches(
        scorer,
        share_of(missing, rank=place.rank, world_size=place.world_size),
        found,
        out=out,
        rank=place.rank,
        say=say,
    )
    for of_rank in gather_objects(lines):
        for line in of_rank:
            _take(found, line)
    num_missing = sum(map(len, missing))
    say(f"{scorer.name}: gave {num_missing} of {num_scores} scores in {time.perf_counter() - start:.1f} s")
    return found


def _read(folder: Path, *, say: Say) -> dict[Key, float]:
    """Return the scores that earlier calls gave."""
    found: dict[Key, float] = {}
    for line in read_lines(folder, needs=NEEDED, say=say):
        _take(found, line)
    return found


def _take(found: dict[Key, float], line: Line) -> None:
    """Keep the first number of each key; NaN until there is one."""
    key = Key(str(line["image"]), str(line["prompt"]), line.get("rival"))
    score = line["score"]
    is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    if math.isnan(found.get(key, math.nan)):
        found[key] = float(score) if is_number else math.nan


def _batches(
    scorer: Scorer | PairJudge, groups: Sequence[Group], rivals: Sequence[Group], drawn: Mapping[str, DrawnImage]
) -> list[Sequence[ScoreTask]]:
    """Return different tasks in batches. Equal images of one prompt belong to the first group that has them."""
    seen: set[Key] = set()
    batches: list[Sequence[ScoreTask]] = []
    for group, against in zip(groups, rivals, strict=True):
        if is_judge(scorer) and group.label == against.label:
            continue
        tasks = []
        for task, other in zip(group.tasks, against.tasks, strict=True):
            rival = drawn[other.path] if is_judge(scorer) else None
            key = key_of(task.prompt.text, drawn[task.path], rival)
            if key not in seen:
                seen.add(key)
                tasks.append(ScoreTask(key, task.path, None if key.rival is None else other.path))
        batches += batches_of(tasks, max(1, scorer.images_at_once))
    return batches


def _score_batches(
    scorer: Scorer | PairJudge,
    batches: Sequence[Sequence[ScoreTask]],
    found: Mapping[Key, float],
    *,
    out: Path,
    rank: int,
    say: Say,
) -> list[Line]:
    log, lines = LineLog(out / folder_of(scorer), rank=rank), []
    pace = Pace(f"{scorer.name}: scored", total=sum(map(len, batches)), say=say)
    try:
        for batch, images, rivals in _decoded(batches, out):
            scores = _scores(scorer, images, rivals, [task.key.prompt for task in batch])
            new = [
                _line(task.key, score)
                for task, score in zip(batch, scores, strict=True)
                if math.isnan(found.get(task.key, math.nan))
            ]
            log.append(new)
            lines += new
            pace.add(len(batch))
    finally:
        log.close()
    return lines


def _line(key: Key, score: float) -> Line:
    rival = {} if key.rival is None else {"rival": key.rival}
    return {"image": key.image, **rival, "prompt": key.prompt, "score": score if math.isfinite(score) else None}


def _scores(
    scorer: Scorer | PairJudge, images: Sequence[Image.Image], rivals: Sequence[Image.Image], prompts: Sequence[str]
) -> list[float]:
    """Return scores; of a judge the probability that an image is better, as a mean over both orders of the two."""
    if is_judge(scorer):
        ahead = np.asarray(scorer.prefer(images, rivals, prompts), dtype=np.float64)  # type: ignore[union-attr]
        behind = np.asarray(scorer.prefer(rivals, images, prompts), dtype=np.float64)  # type: ignore[union-attr]
        values = (ahead + 1 - behind) / 2 if ahead.shape == behind.shape else ahead
    else:
        values = np.asarray(scorer.score(images, prompts), dtype=np.float64)  # type: ignore[union-attr]
    if values.shape != (len(images),):
        raise ScorerError(f"{scorer.name}: gave scores of shape {values.shape} for {len(images)} images")
    return [float(value) for value in values]


def _decoded(
    batches: Sequence[Sequence[ScoreTask]], out: Path
) -> Iterator[tuple[Sequence[ScoreTask], list[Image.Image], list[Image.Image]]]:
    """Yield batches with their images, which a thread decodes ahead of the scorer."""
    thread = ThreadPoolExecutor(1)
    ahead: deque[Future[tuple[list[Image.Image], list[Image.Image]]]] = deque()
    try:
        for place, batch in enumerate(batches):
            for later in batches[place + len(ahead) : place + DECODED_AHEAD]:
                ahead.append(thread.submit(_decode, later, out))
            yield batch, *ahead.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _decode(batch: Sequence[ScoreTask], out: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    images = [_open(out / task.path) for task in batch]
    return images, [_open(out / task.rival_path) for task in batch if task.rival_path is not None]


def _open(path: Path) -> Image.Image:
    try:
        return decode_rgb({"path": str(path)})
    except DataError as error:
        raise DataError(f"{path}: {error}; the next call draws it again") from error
