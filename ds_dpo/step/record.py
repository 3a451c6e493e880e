"""The record of one optimizer step: a JSON file in the run folder from which one process can repeat the step."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.errors import DataError
from ds_dpo.outside import parse_json
from ds_dpo.storage.replace import replace_file

FORMAT = 1
# metrics that are also an objective's statistics of earlier steps
OPTIONS_OF_STATISTICS = ("beta", "baseline", "mean_probability")


@dataclass(frozen=True, kw_only=True)
class RecordedPair:
    """A pair of the step. position: among all pairs of the run. visit: with pair id and seed it fixes every draw."""

    rank: int
    position: int
    visit: int
    pair_id: int
    timestep: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A step, and facts about its run.

    steps_in_a_row: number of skipped steps in a row, this one included. loss_scale: the step's, None without fp16.
    options: the objective's statistics of earlier steps, by name. pairs_seen: before the step. checkpoint: name of the
    folder with the weights that the step began with. pairs: those of all ranks, in order of their positions.
    """

    step: int
    steps_in_a_row: int
    loss: float
    loss_scale: float | None
    options: Mapping[str, float]
    seed: int
    pairs_seen: int
    pairs_per_step: int
    micro_batch_pairs: int
    world_size: int
    stage: int
    precision: str
    fingerprint: str
    checkpoint: str
    pairs: tuple[RecordedPair, ...]


def write_record(record: StepRecord, path: Path) -> None:
    """Write a record, completely or not at all. Raises OSError."""
    document = {"format": FORMAT, **dataclasses.asdict(record)}
    document["loss"] = _plain(record.loss)
    document["pairs"] = [{**dataclasses.asdict(pair), "loss": _plain(pair.loss)} for pair in record.pairs]
    path.parent.mkdir(exist_ok=True)
    replace_file(path, json.dumps(document, indent=2, allow_nan=False), sync=True)


def read_record(path: Path) -> StepRecord:
    """Read a record. Raises DataError that names the file."""
    try:
        document: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if document.pop("format") != FORMAT:
            raise ValueError("another format")
        pairs = tuple(RecordedPair(**{**pair, "loss": float(pair["loss"])}) for pair in document.pop("pairs"))
        return StepRecord(**{**document, "loss": float(document["loss"]), "pairs": pairs})
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not the record of a step ({error})") from error


def _plain(value: float) -> float | str:
    """Return a value for JSON, which has no numbers that are not finite: nan, inf and -inf become text."""
    return value if math.isfinite(value) else str(value)
