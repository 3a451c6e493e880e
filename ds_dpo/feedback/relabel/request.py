"""What scripts/relabel.py is asked to do. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.config.data import DataConfig
from ds_dpo.config.run import RunConfig
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.feedback.relabel.calibration import Method
from ds_dpo.feedback.relabel.verdicts import Combination, HumanUse


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How scores become labels; changing them scores nothing again. calibration: None leaves shares of votes."""

    combination: Combination = "vote"
    least_margin: float = 0.0
    calibration: Method | None = None
    human: HumanUse = "replace"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Pairs, scorers and labels. unit_pairs: pairs that are scored as a whole; a kill loses at most one unit a rank."""

    config: RunConfig
    out: Path
    scorers: Sequence[ScorerChoice]
    options: LabelOptions
    unit_pairs: int = 1024


def data_to_label(data: DataConfig) -> DataConfig:
    """Return how the pairs of a run are read to be labelled: before filters that look at labels."""
    return data.model_copy(
        update={
            "labels": None,
            "ties": "soft",
            "confidence": "ignore",
            "min_confidence": None,
            "max_pairs_per_prompt": None,
            "expected_pairs": None,
            "aspect_buckets": False,
            "cache": None,
        }
    )
