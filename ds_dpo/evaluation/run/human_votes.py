"""Count people's votes on an evaluation: tables for a terminal, DIR/votes.json, and the page with a card for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ds_dpo.evaluation.pages.page import write_page
from ds_dpo.evaluation.results_file import load_results
from ds_dpo.evaluation.run.tables import comparison_rows, text_table
from ds_dpo.evaluation.votes.human import HumanResults, agreement_rows, human_comparisons, remarks, save_human
from ds_dpo.process.say import Say


def count_votes(out: Path, files: Sequence[Path], *, say: Say) -> HumanResults:
    """Compare the models of the evaluation in a folder by vote files.

    Raises DataError for a folder without results and as `read_votes` does, ConfigError if nothing can be written.
    """
    results = load_results(out)
    human = human_comparisons(results, files)
    path = save_human(human, out)
    page = write_page(dataclasses.replace(results, comparisons=[*results.comparisons, *human.comparisons]), out)
    if human.comparisons:
        say(f"\n{text_table(comparison_rows(human.comparisons))}\n")
    else:
        say("no win rate: an interval needs votes on two prompts or more")
    say(f"{text_table(agreement_rows(human))}\n")
    for line in remarks(human):
        say(line)
    say(f"votes: {path}")
    say(f"page: {page}")
    return human
