"""What an evaluation leaves beside its images: summary.json, .csv and .md, TensorBoard, and the lines at its end."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from ds_dpo.data.images import decode_rgb
from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.results import Comparison, ImageRow, Results
from ds_dpo.evaluation.run.prompt_sets import PromptSet
from ds_dpo.evaluation.run.side_effects import SideEffects
from ds_dpo.evaluation.run.tables import comparison_rows, markdown_table, model_rows, text_table
from ds_dpo.storage.replace import replace_file

SUMMARY_NAME, CSV_NAME, MARKDOWN_NAME, TENSORBOARD_NAME = "summary.json", "summary.csv", "summary.md", "tensorboard"
SHOWN_PROMPTS = 4  # in TensorBoard
MOST_PRINTED = 40  # comparisons; summary.md has all
Means = Mapping[str, Mapping[str, float | None]]
Effects = Mapping[str, SideEffects]


def mean_scores(results: Results, *, of: Any = np.mean) -> dict[str, dict[str, float | None]]:
    """Return a mean (or another figure, such as np.median) over a model's images, by label and scorer."""
    found: dict[str, dict[str, float | None]] = {}
    for model in results.models:
        own = [image for image in results.images if image.model == model.label]
        found[model.label] = {}
        for scorer in results.scorers:
            scores = [score for image in own if (score := image.scores[scorer.name]) is not None]
            found[model.label][scorer.name] = float(of(scores)) if scores else None
    return found


def summary_of(results: Results, sets: Sequence[PromptSet], effects: Effects) -> dict[str, Any]:
    """Return the content of summary.json."""
    means, medians = mean_scores(results), mean_scores(results, of=np.median)
    return {
        "evaluation": results.evaluation,
        "n": len(results.images) // len(results.models),
        "models": {
            model.label: {
                "path": model.source,
                "step": model.step,
                "scores": {
                    name: {"mean": mean, "median": medians[model.label][name]}
                    for name, mean in means[model.label].items()
                },
                **asdict(effects[model.label]),
            }
            for model in results.models
        },
        "scorers": {
            scorer.name: {"higher_is_better": scorer.higher_is_better, "record": dict(scorer.record)}
            for scorer in results.scorers
        },
        "prompt_sets": {
            each.name: {"prompts": len(each.prompts), "categories": list(each.categories)} for each in sets
        },
        **results.settings,
        "comparisons": [asdict(each) for each in results.comparisons],
        "warnings": list(results.warnings),
    }


def write_summary(out: Path, summary: Mapping[str, Any], results: Results, effects: Effects) -> None:
    """Write the CSV, the Markdown and at last summary.json. Raises ConfigError if one cannot be written."""
    _write(out / CSV_NAME, csv_text(results.comparisons))
    _write(out / MARKDOWN_NAME, markdown_text(results, effects))
    # written last, so that a summary means that all files exist
    _write(out / SUMMARY_NAME, json.dumps(summary, indent=2, allow_nan=False, default=str) + "\n")


def csv_text(comparisons: Sequence[Comparison]) -> str:
    """Return the comparisons as CSV, with the names of `Comparison`."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(Comparison)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in comparisons)
    return buffer.getvalue()


def markdown_text(results: Results, effects: Effects) -> str:
    """Return the report as a page of Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items() if name != "versions")
    parts = [
        "# Evaluation",
        f"The same prompts and seeds for all models ({settings}). A tie is half a win. Intervals resample prompts; "
        "p is that of the sign test over prompts, corrected for the number of scorers (Holm).",
        markdown_table(comparison_rows(results.comparisons)),
        markdown_table(model_rows(results, mean_scores(results), effects)),
        *(f"- {warning}" for warning in results.warnings),
    ]
    return "\n\n".join(parts) + "\n"


def printed(results: Results, effects: Effects) -> str:
    """Return the tables for a terminal: sets first, and categories only if there is room for all."""
    all_of_them = results.comparisons
    shown = [each for each in all_of_them if each.category is None] if len(all_of_them) > MOST_PRINTED else all_of_them
    models = text_table(model_rows(results, mean_scores(results), effects))
    if not shown:
        return models
    left_out = len(all_of_them) - len(shown)
    note = [f"{left_out} comparisons of categories are in {MARKDOWN_NAME}"] if left_out else []
    return "\n\n".join([text_table(comparison_rows(shown)), *note, models])


def write_tensorboard(out: Path, results: Results, effects: Effects) -> None:
    """Write scalars by scorer and model, at the step of the model's run, and the first images of each model."""
    from torch.utils.tensorboard import SummaryWriter

    folder = out / TENSORBOARD_NAME
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call; two files would show each point twice
    steps = {model.label: model.step or 0 for model in results.models}
    means = mean_scores(results)
    try:
        with SummaryWriter(str(folder)) as events:
            for each in results.comparisons:
                place = each.prompts if each.category is None else f"{each.prompts}/{each.category}"
                for name in ("win_rate", "mean_difference"):
                    tag = f"{name}/{each.scorer}/{place}/{each.model}"
                    events.add_scalar(tag, getattr(each, name), steps[each.model])
            for label, step in steps.items():
                values = {**means[label], **asdict(effects[label])}
                for name, value in values.items():
                    if value is not None:
                        events.add_scalar(f"{name}/{label}", value, step)
            for image in _first_images(results):
                pixels = np.asarray(decode_rgb((out / image.path).read_bytes()))
                tag = f"{results.prompts[image.prompt].prompt[:80]}/{image.model}"
                events.add_image(tag, pixels, steps[image.model], dataformats="HWC")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error


def _first_images(results: Results) -> list[ImageRow]:
    """Return for each model the first image of each of the first prompts."""
    first: dict[tuple[int, str], ImageRow] = {}
    for image in results.images:
        if image.prompt < SHOWN_PROMPTS:
            first.setdefault((image.prompt, image.model), image)
    return list(first.values())


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text, sync=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder") from error
