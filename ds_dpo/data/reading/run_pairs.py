"""The pairs of a run: those that it trains on, and those that it holds out."""

from __future__ import annotations

from ds_dpo.config.run import RunConfig
from ds_dpo.data.reading.held_out_data import held_out_data, named_as_held_out
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.selection.prompt_share import PromptShare
from ds_dpo.data.source import PairSource
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

MIN_HELD_OUT_PAIRS = 2


def open_trained_on(config: RunConfig, *, say: Say, in_file_order: bool = False) -> PairSource:
    """Open the pairs that a run trains on, without those that held_out.share holds out; see open_source."""
    share = config.held_out.share
    part = None if share is None else PromptShare(share=share, side="trained_on")
    return open_source(config.data, say=say, in_file_order=in_file_order, part=part)


def open_held_out_pairs(config: RunConfig, *, say: Say) -> PairSource:
    """Open the pairs that a run holds out; see open_source. Errors name the fields of held_out where these are set.

    Raises DataError also for fewer than 2 pairs.
    """
    share = config.held_out.share
    part = None if share is None else PromptShare(share=share, side="held_out")
    with named_as_held_out(config):
        source = open_source(held_out_data(config), say=say, part=part)
    if len(source) < MIN_HELD_OUT_PAIRS:
        raise DataError(
            f"held_out: {source.description}; an interval needs at least {MIN_HELD_OUT_PAIRS} pairs"
            + ("" if share is None else f": give a larger held_out.share than {share:g}")
        )
    return source
