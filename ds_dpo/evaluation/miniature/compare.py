"""What the comparison of base, tuned miniature and SFT control has beside the scores: measurements and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_dpo.data.images import decode_rgb
from ds_dpo.evaluation.miniature.picture import comparison_picture
from ds_dpo.evaluation.miniature.report import BASE, SFT, TUNED, Judged, judge, summarize, table
from ds_dpo.evaluation.pages.picture import save_png
from ds_dpo.evaluation.results import Results
from ds_dpo.miniature.world import IMAGE_SIZE
from ds_dpo.process.say import Say

PROMPT_SET = "miniature"
PICTURE_NAME = "grid.png"


def is_miniature(results: Results) -> bool:
    """Return whether these are the miniature's images, by models with the labels base and tuned."""
    labels = {model.label for model in results.models}
    sets = {prompt.prompt_set for prompt in results.prompts}
    is_small = results.settings.get("resolution") == IMAGE_SIZE
    return {BASE, TUNED} <= labels and sets == {PROMPT_SET} and is_small


def add_miniature(summary: Mapping[str, Any], results: Results, out: Path, *, say: Say) -> dict[str, Any]:
    """Return the summary with the miniature's figures beside it, and write OUT/grid.png; prints their table.

    Raises ConfigError if the picture cannot be written, DataError for an image that cannot be decoded.
    """
    labels = [model.label for model in results.models if model.label in (BASE, SFT, TUNED)]
    judged = {label: _judge(results, label, out) for label in labels}
    own = summarize(judged)
    say(f"{table(own)}\n")
    picture = comparison_picture(judged, own, seeds=int(str(results.settings["seeds"])))
    save_png(picture, out / PICTURE_NAME)
    say(f"pictures: {out / PICTURE_NAME}")
    models = {label: {**facts, **own["models"].get(label, {})} for label, facts in summary["models"].items()}
    kept = {name: value for name, value in own.items() if name not in ("models", "comparisons")}
    prompts = list(dict.fromkeys(prompt.prompt for prompt in results.prompts))
    return {**summary, **kept, "models": models, "prompts": prompts}


def _judge(results: Results, label: str, out: Path) -> Judged:
    own = [image for image in results.images if image.model == label]
    pixels = np.stack([np.asarray(decode_rgb({"path": str(out / image.path)})) for image in own])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return judge(images, [results.prompts[image.prompt].prompt for image in own])
