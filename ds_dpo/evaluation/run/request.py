"""What may be asked of an evaluation, and the settings that it comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.drawing.named_model import ModelChoice
from ds_dpo.evaluation.drawing.sampling import MAX_IMAGES_AT_ONCE
from ds_dpo.evaluation.run.prompt_sets import PromptSet
from ds_dpo.evaluation.run.settings import EvaluationRecord, Settings
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.models.vae import PIXELS_AT_ONCE
from ds_dpo.precision import Precision

MINIATURE = "miniature"
FIRST_SEED = 1_000_000
DEFAULTS: Mapping[str, Any] = {
    "seeds": 1,
    "first_seed": FIRST_SEED,
    "steps": 30,
    "guidance": 5.0,
    "scheduler": "model",
    "vae": None,
    "variant": None,
}
MINIATURE_DEFAULTS: Mapping[str, Any] = {"seeds": 8, "steps": 20, "guidance": 1.0, "scheduler": "ddim"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate. labels: one that is None is made from the name. prompts, scorers: at least one of each.

    against: label of the model that others are compared with, the first one if None. trained_on: names of scorers.
    The others are settings; one that is None is that of the folder's earlier calls, or else a default.
    """

    models: tuple[ModelChoice, ...]
    labels: tuple[str | None, ...] = ()
    against: str | None = None
    prompts: tuple[str, ...]
    scorers: tuple[ScorerChoice, ...]
    trained_on: tuple[str, ...] = ()
    out: Path
    device: str = "auto"
    seeds: int | None = None
    first_seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    resolution: int | None = None
    batch: int | None = None
    dtype: Precision | None = None
    vae: str | None = None
    variant: str | None = None


def check_request(request: Request) -> None:
    """Raise ConfigError for numbers that cannot be, and an `out` that is no folder."""
    for name in ("seeds", "steps", "resolution", "batch"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be 1 or more")
    if request.guidance is not None and not (request.guidance >= 1 and math.isfinite(request.guidance)):
        raise ConfigError(f"--guidance {request.guidance}: must be 1 (off) or more")
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out {request.out} is a file; give a folder")


def choose_settings(
    request: Request,
    old: EvaluationRecord | None,
    sets: Sequence[PromptSet],
    *,
    default_dtype: Precision,
    own_resolution: Callable[[], int],
) -> Settings:
    """Return the settings of an evaluation: those asked for, else those recorded, else the defaults.

    own_resolution: returns that of the first model, which must be loaded for it. Raises ConfigError for seeds that
    cannot be, or from which the pairs of the miniature were drawn.
    """
    is_miniature = all(each.name == MINIATURE for each in sets)
    chosen: dict[str, Any] = {**DEFAULTS, **(MINIATURE_DEFAULTS if is_miniature else {}), "dtype": default_dtype}
    for field in fields(Settings):
        recorded = None if old is None else getattr(old.settings, field.name)
        asked = getattr(request, field.name)
        if asked is not None or recorded is not None:
            chosen[field.name] = recorded if asked is None else asked
    if "resolution" not in chosen:
        chosen["resolution"] = own_resolution()
    chosen.setdefault("batch", min(MAX_IMAGES_AT_ONCE, max(1, PIXELS_AT_ONCE // chosen["resolution"] ** 2)))
    settings = Settings(**chosen)
    for each in sets:
        _check_seeds(settings, each)
    return settings


def _check_seeds(settings: Settings, prompt_set: PromptSet) -> None:
    own = range(settings.first_seed, settings.first_seed + len(prompt_set.prompts) * settings.seeds)
    if own.start < 0 or own.stop > 2**63:
        raise ConfigError(f"--first_seed {settings.first_seed}: must be 0 or more and leave room for {len(own)} seeds")
    if prompt_set.name != MINIATURE:
        return
    from ds_dpo.miniature.pairs import SPLITS

    for split, (prompts, repeats, first) in SPLITS.items():
        used = range(first, first + len(prompts) * repeats)
        if own.start < used.stop and used.start < own.stop:
            raise ConfigError(
                f"--first_seed {settings.first_seed}: {own.start}..{own.stop - 1} overlaps "
                f"{used.start}..{used.stop - 1}, from which the pairs of {split} were drawn; give {FIRST_SEED}"
            )
