"""From the scores of a folder to its file of labels, and to what the labels are worth beside human ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ds_dpo.data.reading.labels_file import LABELS_SCHEMA
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.feedback.relabel.agreement import agreement, agreement_matrix, unanimous_share
from ds_dpo.feedback.relabel.calibration import Calibration, CalibrationQuality, fit, quality
from ds_dpo.feedback.relabel.making import HIGHER, LOWER, SCORES_NAME, ScoresRecord
from ds_dpo.feedback.relabel.request import LabelOptions
from ds_dpo.feedback.relabel.scoring import column_of
from ds_dpo.feedback.relabel.verdicts import Verdicts, combine, votes, with_human_labels
from ds_dpo.storage.replace import replace_file, replacing

LABELS_NAME, REPORT_NAME = "labels.parquet", "report.json"
COMBINED = "combined"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of P pairs. margins: by scorer, (P,), positive if the lower image is better. human: label, NaN if none."""

    pair_ids: pa.ChunkedArray
    uids: pa.ChunkedArray
    prompt_keys: pa.ChunkedArray
    human: NDArray[np.float64]
    margins: Mapping[str, NDArray[np.float64]]


def read_scores(out: Path, record: ScoresRecord) -> Scores:
    """Read the scores of a finished folder. Raises DataError if they are damaged."""
    try:
        table = pq.read_table(out / SCORES_NAME)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{out / SCORES_NAME} cannot be read ({error}); remove {out} and score again") from error
    margins = {}
    for name, is_higher_better in record.higher_is_better.items():
        margin = _numbers(table[column_of(name) + LOWER]) - _numbers(table[column_of(name) + HIGHER])
        margins[name] = margin if is_higher_better else -margin
    # a judge's probability around one half: the same sign, and zero for a tie
    margins |= {name: 2 * _numbers(table[column_of(name)]) - 1 for name in record.judges}
    return Scores(
        pair_ids=table["pair_id"],
        uids=table["uid"],
        prompt_keys=table["prompt_key"],
        human=_numbers(table["human"]),
        margins=margins,
    )


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.to_numpy(), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A scorer's calibration on all pairs with a human label, and its quality when fitted on half of the prompts."""

    calibration: Calibration
    held_out: CalibrationQuality


def label_pairs(scores: Scores, options: LabelOptions) -> tuple[Verdicts, dict[str, Calibrated]]:
    """Return the labels of all pairs, and each scorer's calibration if one is asked for.

    Raises ConfigError if human labels are needed and there are too few.
    """
    margins = np.stack(list(scores.margins.values()))
    is_decided = (scores.human == 1) | (scores.human == 0)
    if options.human != "replace" and not is_decided.any():
        raise ConfigError(f"--human {options.human}: no pair has a human label; replace would fit")
    calibrated: dict[str, Calibrated] = {}
    probabilities = votes(margins)
    if options.calibration is not None:
        for row, (name, margin) in enumerate(scores.margins.items()):
            calibrated[name] = _calibrate(name, margin, scores, options)
            probabilities[row] = calibrated[name].calibration.probabilities(margin)
    found = combine(margins, probabilities, combination=options.combination, least_margin=options.least_margin)
    return with_human_labels(found, scores.human, options.human), calibrated


def _calibrate(name: str, margin: NDArray[np.float64], scores: Scores, options: LabelOptions) -> Calibrated:
    assert options.calibration is not None
    usable = ((scores.human == 1) | (scores.human == 0)) & ~np.isnan(margin)
    # by prompt, so that no prompt is on both sides; its key is a hash
    half = np.array([key is not None and key[0] % 2 == 1 for key in scores.prompt_keys.to_pylist()])
    try:
        whole = fit(margin[usable], scores.human[usable], options.calibration)
        first = fit(margin[usable & ~half], scores.human[usable & ~half], options.calibration)
    except ValueError as error:
        raise ConfigError(
            f"--calibrate {options.calibration}: scorer {name} cannot be calibrated on human labels: {error}; leave "
            "--calibrate out, or label a data set with human labels"
        ) from error
    other = usable & half
    return Calibrated(calibration=whole, held_out=quality(first.probabilities(margin[other]), scores.human[other]))


def write_labels(out: Path, scores: Scores, found: Verdicts, record: ScoresRecord) -> int:
    """Write out/labels.parquet; returns the number of labels."""
    is_labelled = ~np.isnan(found.label)
    number = int(is_labelled.sum())
    names = "+".join(scores.margins)
    versions = json.dumps(record.plan["scorers"], sort_keys=True)
    kept = pa.array(np.flatnonzero(is_labelled))
    columns = [
        scores.pair_ids.take(kept),
        scores.uids.take(kept),
        pa.array(found.label[is_labelled]),
        pa.array(found.margin[is_labelled], from_pandas=True),
        pa.array(found.probability[is_labelled], from_pandas=True),
        pa.array([names] * number, pa.string()),
        pa.array([versions] * number, pa.string()),
    ]
    with replacing(out / LABELS_NAME, sync=True) as temporary:
        pq.write_table(pa.table(columns, schema=LABELS_SCHEMA), temporary)
    return number


def report_of(
    scores: Scores,
    found: Verdicts,
    calibrated: Mapping[str, Calibrated],
    *,
    record: ScoresRecord,
    options: LabelOptions,
) -> dict[str, Any]:
    """Return all figures on the labels as JSON values."""
    labels = {name: votes(margin) for name, margin in scores.margins.items()}
    of_scorers = {
        name: asdict(agreement(labels[name], scores.human, margin)) for name, margin in scores.margins.items()
    }
    # before human labels have their say: agreement with a label that was taken over says nothing
    own = combine(
        np.stack(list(scores.margins.values())),
        votes(np.stack(list(scores.margins.values()))),
        combination=options.combination,
        least_margin=options.least_margin,
    )
    return {
        "pairs": record.pairs,
        "unreadable_pairs": record.unreadable_pairs,
        "unscored_images": record.unscored_images,
        "human_labels": int(((scores.human == 1) | (scores.human == 0)).sum()),
        "labels": int((~np.isnan(found.label)).sum()),
        "ties": int((found.label == 0.5).sum()),
        "options": asdict(options),
        "scorers": record.plan["scorers"],
        "agreement_with_human_labels": {
            **of_scorers,
            **({COMBINED: asdict(agreement(own.label, scores.human, own.margin))} if len(labels) > 1 else {}),
        },
        "agreement_of_scorers": agreement_matrix(labels) if len(labels) > 1 else {},
        "unanimous_share": unanimous_share(np.stack(list(labels.values()))) if len(labels) > 1 else None,
        "calibration": {name: asdict(one) for name, one in calibrated.items()},
    }


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write out/report.json."""
    replace_file(out / REPORT_NAME, json.dumps(report, indent=2, allow_nan=False) + "\n", sync=True)
