"""An evaluation that was never run: results of any size with scores from a formula, and images of one colour each."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ds_dpo.evaluation.results import Comparison, ImageRow, ModelRow, PromptRow, Results, ScorerRow

MODELS, SCORERS = ("base", "tuned"), ("clip", "brisque")
CATEGORIES = ("animals", "food & drink")


def made_results(
    folder: Path | None,
    *,
    prompts: Sequence[str],
    models: Sequence[str] = MODELS,
    seeds: Sequence[int] = (0,),
    pixels: int = 8,
) -> Results:
    """Return results of each model, prompt and seed; with a folder, their images are written below it.

    The last model leads by clip on all but each fifth prompt, and brisque (lower is better) agrees on even prompts.
    """
    images = []
    for number in range(len(prompts)):
        for seed in seeds:
            for place, model in enumerate(models):
                path = f"images/{model}/{number:05d}_{seed}.png"
                content = _png(number, place, pixels) if folder is not None else f"{model} {number} {seed}".encode()
                if folder is not None:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(content)
                lead = place * (1 + number % 7) * (-1 if number % 5 == 4 else 1)
                scores = {"clip": 20 + lead, "brisque": 30 - lead * (1 if number % 2 == 0 else -1)}
                sha256 = hashlib.sha256(content).hexdigest()
                images.append(ImageRow(model=model, prompt=number, seed=seed, path=path, sha256=sha256, scores=scores))
    rows = [PromptRow(prompt=text, prompt_set="made", category=CATEGORIES[n % 2]) for n, text in enumerate(prompts)]
    return Results(
        evaluation="made-evaluation",
        models=[ModelRow(label=model, source=f"/models/{model}") for model in models],
        scorers=[ScorerRow(name=name, higher_is_better=name != "brisque", record={}) for name in SCORERS],
        prompts=rows,
        images=images,
        comparisons=[_comparison(models[-1], rival, name) for rival in models[:-1] for name in SCORERS],
        settings={"steps": 20, "guidance": 5.0},
        warnings=["clip and brisque disagree on half of the pairs"],
    )


def _comparison(model: str, against: str, scorer: str) -> Comparison:
    return Comparison(
        model=model,
        against=against,
        scorer=scorer,
        prompts="made",
        category=None,
        n=100,
        num_prompts=50,
        win_rate=0.625,
        low=0.5,
        high=0.75,
        mean_difference=0.25,
        mean_low=-0.125,
        mean_high=0.5,
        median_difference=0.2,
        p_value=0.0625,
        adjusted_p_value=0.125,
        prompts_needed=321,
    )


def _png(number: int, place: int, pixels: int) -> bytes:
    colour = ((number * 67 + place * 90) % 256, (number * 29) % 256, (number * 131 + place * 40) % 256)
    buffer = io.BytesIO()
    Image.fromarray(np.full((pixels, pixels, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
