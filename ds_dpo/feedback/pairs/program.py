"""What scripts/make_pairs.py does after images are drawn and scored: form pairs, write them, say what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import DataError
from ds_dpo.evaluation.drawing.model_folder import ModelFolder
from ds_dpo.evaluation.drawing.named_model import ModelChoice, find_models
from ds_dpo.evaluation.drawing.pipeline_parts import family_in
from ds_dpo.evaluation.results import Results
from ds_dpo.feedback.pairs.forming import Rule, form_pairs
from ds_dpo.feedback.pairs.names import PAIRS_NAME, RECORD_NAME
from ds_dpo.feedback.pairs.writing import write_pairs
from ds_dpo.models.loading import latent_shape
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replace_file

EXPORTED_RUNS = "models/*/vae/config.json"  # where an evaluation keeps pipelines of runs
SHAPE_OF_SINGLE_FILES = 4, 8  # channels of a latent of SD and SDXL, and pixels of its side in those of an image


@dataclass(frozen=True, kw_only=True)
class PairRequest:
    """Which pairs to form. models: those that were drawn, as given. against: label, for the rule of this name."""

    out: Path
    rule: Rule
    least_margin: float
    models: Sequence[ModelChoice]
    vae: str | None
    variant: str | None
    against: str | None


def make_pairs(request: PairRequest, results: Results, *, say: Say) -> None:
    """Write out/pairs.parquet and out/pairs.json of an evaluation in `out`.

    Raises ConfigError for a rule that lacks images, DataError if no pair is left.
    """
    found = form_pairs(results, rule=request.rule, least_margin=request.least_margin, against=request.against)
    if not found.pairs:
        raise DataError(
            f"--pairs {request.rule}: no pair is left of {len(results.images)} images: {found.undecided} pairs have "
            f"equal scores or a margin below {request.least_margin:g}, {found.unscored_images} images have no score"
        )
    shape = noise_shape(request, resolution=int(str(results.settings["resolution"])))
    path = request.out / PAIRS_NAME
    write_pairs(path, found.pairs, folder=request.out, noise_shape=shape)
    record = {
        "pairs": len(found.pairs),
        "undecided": found.undecided,
        "unscored_images": found.unscored_images,
        "rule": request.rule,
        "least_margin": request.least_margin,
        "prompts": len({pair.chosen.prompt for pair in found.pairs}),
        "evaluation": results.evaluation,
        "models": {model.label: model.source for model in results.models},
        "scorers": {scorer.name: dict(scorer.record) for scorer in results.scorers},
        "settings": dict(results.settings),
        "noise_shape": list(shape),
    }
    replace_file(request.out / RECORD_NAME, json.dumps(record, indent=2) + "\n", sync=True)
    say(
        f"{len(found.pairs)} pairs of {record['prompts']} prompts; {found.undecided} left out for equal scores or a "
        f"small margin, {found.unscored_images} images without a score"
    )
    say(f"train on them with --dataset {path} --data.format pickapic")


def noise_shape(request: PairRequest, *, resolution: int) -> tuple[int, int, int]:
    """Return C, H, W of the noise from which the first model draws, from configurations alone."""
    exported = sorted(request.out.glob(EXPORTED_RUNS))
    if exported:
        folder: Path | None = exported[0].parent.parent
    else:
        source = find_models(request.models[:1], base=None, variant=request.variant)[0].source
        folder = source.rest if isinstance(source, ModelFolder) or source.rest is not None else None
    if folder is None:
        channels, factor = SHAPE_OF_SINGLE_FILES
        return channels, resolution // factor, resolution // factor
    model = ModelConfig(pretrained=str(folder), family=family_in(folder), vae=request.vae)
    return latent_shape(model, (resolution, resolution))
