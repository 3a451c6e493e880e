"""Vote files as an evaluation's page exports them, of pairs and outcomes of choice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.evaluation.results import Results


def vote_row(
    results: Results, prompt: int, label: float, *, rater: str = "Anna", models: tuple[str, str] = ("tuned", "base")
) -> dict[str, Any]:
    """A vote on the images of a prompt of seed 0. label: 1 if the first model is better."""
    images = [
        next(each for each in results.images if (each.model, each.prompt, each.seed) == (model, prompt, 0))
        for model in models
    ]
    return {
        "prompt": results.prompts[prompt].prompt,
        "image_0": images[0].path,
        "image_1": images[1].path,
        "label": label,
        "model_0": models[0],
        "model_1": models[1],
        "outcome": {1: "model_0", 0: "model_1"}.get(label, "tie"),
        "rater": rater,
        "evaluation": results.evaluation,
        "shuffle_seed": 0,
        "place": prompt,
        "left": "model_0",
        "sha256_0": images[0].sha256,
        "sha256_1": images[1].sha256,
        "image_seed": "0",
        "prompt_set": results.prompts[prompt].prompt_set,
        "category": results.prompts[prompt].category,
    }


def vote_file(path: Path, *rows: Mapping[str, Any] | str) -> Path:
    """Write rows as JSON lines; a row that is a text is a line as it is."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path
