"""From the choice of a scorer to the scorer itself, which loads its weights on a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from ds_dpo.errors import DsDpoError, ScorerError, cut
from ds_dpo.evaluation.scorers.batches import is_out_of_memory
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.scorer import PairJudge, Scorer
from ds_dpo.evaluation.scorers.table import SCORERS, plugins

Maker = Callable[[ScorerChoice, str], Scorer | PairJudge]


def open_scorer(choice: ScorerChoice, device: str) -> Scorer | PairJudge:
    """Return the scorer of a choice, ready to score. device: as torch names it, such as cuda:0.

    Raises ScorerError, which says what to install, download or mend, if it cannot be loaded.
    """
    row = SCORERS.get(choice.kind)
    if row is None:
        return _open_plugin(choice, device)
    module, _, name = row.made_by.partition(":")
    try:
        return cast(Maker, getattr(importlib.import_module(module), name))(choice, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ScorerError(
            f"scorer {choice.name}: its weights do not fit the free memory of {device} ({cut(str(error))}); score with "
            "fewer scorers at once, or on another device"
        ) from error


def is_judge(scorer: Scorer | PairJudge) -> bool:
    """Return whether a scorer compares pairs of images instead of giving each a number."""
    return hasattr(scorer, "prefer")


def _open_plugin(choice: ScorerChoice, device: str) -> Scorer | PairJudge:
    point = plugins().get(choice.kind)
    if point is None:
        raise ScorerError(f"scorer {choice.name}: no installed package has a scorer {choice.kind}; install its package")
    package = f" of {point.dist.name}" if point.dist is not None else ""
    try:
        scorer: Any = point.load()(choice, device)
    except DsDpoError:
        raise
    except Exception as error:  # code of others
        raise ScorerError(
            f"scorer {choice.name}: the plugin {point.value}{package} cannot be loaded "
            f"({type(error).__name__}: {cut(str(error))}); mend it, or install what it needs"
        ) from error
    lacks = [part for part in ("name", "images_at_once", "record") if not hasattr(scorer, part)]
    if not (hasattr(scorer, "score") and hasattr(scorer, "higher_is_better")) and not hasattr(scorer, "prefer"):
        lacks.append("score and higher_is_better, or prefer")
    if lacks:
        raise ScorerError(
            f"scorer {choice.name}: the plugin {point.value}{package} makes no scorer: it lacks {', '.join(lacks)}"
        )
    return cast(Scorer | PairJudge, scorer)
