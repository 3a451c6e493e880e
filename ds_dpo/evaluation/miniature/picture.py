"""The picture of a comparison: images of the same prompt and noise side by side, with their rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from ds_dpo.evaluation.miniature.report import BASE, MARGIN, SFT, TUNED, Judged
from ds_dpo.evaluation.pages.picture import Group, Mark, Row, Tile, image_grid

SHOWN_PROMPTS = 8
SHOWN_TILES = 9  # per row
HEADINGS = {BASE: "base", SFT: "SFT", TUNED: "tuned"}  # in the order of the columns


def comparison_picture(judged: Mapping[str, Judged], summary: Mapping[str, Any], *, seeds: int) -> Image.Image:
    """Return a picture of the first prompts with the first of their seeds: they are not selected, and its text says so.

    judged: each model's images, all seeds of the first prompt first. seeds: number of images per prompt.
    """
    names = [name for name in HEADINGS if name in judged]
    prompts = list(dict.fromkeys(judged[BASE].prompts))
    shown_prompts = prompts[:SHOWN_PROMPTS]
    shown_seeds = min(seeds, SHOWN_TILES // len(names))
    columns = tuple(HEADINGS[name] for name in names)
    groups = [Group(f"noise {place + 1}", columns) for place in range(shown_seeds)]
    rows = []
    for row, prompt in enumerate(shown_prompts):
        images = [row * seeds + place for place in range(shown_seeds)]
        tiles = [_tile(judged, name, image) for image in images for name in names]
        rows.append(Row(prompt, tuple(tiles)))
    notes = [
        f"The first {len(shown_prompts)} of {len(prompts)} test prompts, each with the first {shown_seeds} of {seeds} "
        "noises: not picked. Images that stand under one line came from the same prompt and the same noise.",
        f"Number: reward, 0 to {summary['reward_max']:g} (right colour 1, vivid 0.5, centred 0.5; 0 if not one clean "
        f"shape). Green 'won', orange 'lost': more than {MARGIN} above or below base's image of the same noise.",
        f"Over all {summary['n']} images a model: {_results(summary, names)}",
    ]
    return image_grid(
        rows, groups, title=f"{', '.join(columns)}: what each model draws from the same prompts and noise", notes=notes
    )


def _tile(judged: Mapping[str, Judged], name: str, image: int) -> Tile:
    reward = judged[name].found.reward[image].item()
    text = f"{reward:.2f}"
    mark: Mark | None = None
    if name != BASE:
        gain = reward - judged[BASE].found.reward[image].item()
        mark = "win" if gain > MARGIN else "loss" if gain < -MARGIN else None
        text += {"win": " won", "loss": " lost", None: ""}[mark]
    return Tile(judged[name].images[image], text, mark)


def _results(summary: Mapping[str, Any], names: list[str]) -> str:
    rewards = ", ".join(f"{HEADINGS[name]} {summary['models'][name]['reward']:.2f}" for name in names)
    low, high = summary["win_rate_low"], summary["win_rate_high"]
    return (
        f"mean reward {rewards}; tuned beats base on {summary['win_rate']:.0%} (95 % interval {low:.0%} to {high:.0%})."
    )
