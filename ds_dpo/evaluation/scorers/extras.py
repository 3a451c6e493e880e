"""Packages that only some scorers need: imported when such a scorer opens, with one message if one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from ds_dpo.errors import ScorerError, cut
from ds_dpo.evaluation.scorers.table import EVAL_EXTRA


def require_packages(scorer: str, *modules: str) -> list[ModuleType]:
    """Import modules. Raises ScorerError, with the command that installs them, if one cannot be imported."""
    imported = []
    for module in modules:
        try:
            imported.append(importlib.import_module(module))
        except Exception as error:  # a library built for another one may raise anything
            raise ScorerError(
                f"scorer {scorer}: the package {module.partition('.')[0]} cannot be imported ({cut(str(error))}); "
                f"install it by {EVAL_EXTRA}"
            ) from error
    return imported
