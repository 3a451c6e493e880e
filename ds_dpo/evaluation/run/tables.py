"""The results of an evaluation as tables for people: on a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ds_dpo.evaluation.results import Comparison, Results

if TYPE_CHECKING:
    from ds_dpo.evaluation.run.side_effects import SideEffects

COMPARISON_TITLES = (
    "model", "against", "prompts", "scorer", "n", "win rate (95 %)", "difference (95 %)", "median", "p", "p corrected",
    "prompts needed",
)  # fmt: skip
Rows = list[list[str]]


def comparison_rows(comparisons: Sequence[Comparison]) -> Rows:
    """Return the titles, and a row for each comparison."""
    return [list(COMPARISON_TITLES), *map(_comparison_row, comparisons)]


def _comparison_row(each: Comparison) -> list[str]:
    return [
        each.model,
        each.against,
        each.prompts if each.category is None else f"{each.prompts}: {each.category}",
        each.scorer,
        str(each.n),
        f"{each.win_rate:.1%} [{each.low:.1%}, {each.high:.1%}]",
        f"{each.mean_difference:+.4g} [{each.mean_low:+.4g}, {each.mean_high:+.4g}]",
        f"{each.median_difference:+.4g}",
        f"{each.p_value:.2g}",
        f"{each.adjusted_p_value:.2g}",
        "-" if each.prompts_needed is None else str(each.prompts_needed),
    ]


def model_rows(
    results: Results, means: Mapping[str, Mapping[str, float | None]], effects: Mapping[str, SideEffects]
) -> Rows:
    """Return the titles, and a row for each model: its mean scores, and how its images look.

    means: by label, then by scorer. effects: by label.
    """
    names = [scorer.name for scorer in results.scorers]
    rows = [["model", *names, "diversity", "saturation", "contrast", "blank", "black"]]
    for model in results.models:
        look = effects[model.label]
        scores = [_number(means[model.label][name]) for name in names]
        looks = [_number(look.diversity), f"{look.saturation:.3f}", f"{look.contrast:.3f}"]
        rows.append([model.label, *scores, *looks, f"{look.blank:.1%}", f"{look.black:.1%}"])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def text_table(rows: Rows) -> str:
    """Return rows as lines for a terminal, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown_table(rows: Rows) -> str:
    """Return rows as a table of Markdown, in which the names of others change nothing."""
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _escaped(cell: str) -> str:
    for mark in "\\|`*_<[":
        cell = cell.replace(mark, f"\\{mark}")
    return " ".join(cell.split())
