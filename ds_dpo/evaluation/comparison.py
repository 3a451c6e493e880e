"""From the figures of a comparison to its row in the results."""

from __future__ import annotations

from ds_dpo.evaluation.results import Comparison
from ds_dpo.evaluation.statistics.paired import PairedFigures


def comparison_of(
    figures: PairedFigures, *, model: str, against: str, scorer: str, prompts: str, category: str | None
) -> Comparison:
    """Return the row of a model against another one; its p value is not corrected yet."""
    return Comparison(
        model=model,
        against=against,
        scorer=scorer,
        prompts=prompts,
        category=category,
        n=figures.n,
        num_prompts=figures.num_prompts,
        win_rate=figures.win_rate.mean,
        low=figures.win_rate.low,
        high=figures.win_rate.high,
        mean_difference=figures.difference.mean,
        mean_low=figures.difference.low,
        mean_high=figures.difference.high,
        median_difference=figures.median_difference,
        p_value=figures.p_value,
        adjusted_p_value=figures.p_value,
        prompts_needed=figures.prompts_needed,
    )
