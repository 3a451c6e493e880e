"""Training with a cached reference: its errors join the pairs after a check that they belong to this run."""

from __future__ import annotations

from dataclasses import replace

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.encoding.feed import PairFeed
from ds_dpo.precision import Precision
from ds_dpo.process.say import Say
from ds_dpo.reference.cache.errors import PairsWithReferenceErrors, ReferenceErrors, open_reference_errors
from ds_dpo.reference.cache.fingerprint import StartOfPolicy, fingerprint_of


def open_covering_errors(config: RunConfig, *, say: Say) -> ReferenceErrors:
    """Open reference.cache; every rank calls it.

    Raises on all ranks: DataError if it is not complete, and ConfigError if it lacks pair visits of the run.
    """
    with raised_everywhere():
        errors = _open_covering(config, say=say)
    return errors


def _open_covering(config: RunConfig, *, say: Say) -> ReferenceErrors:
    assert config.reference.cache is not None, "a rule of the configuration"
    errors = open_reference_errors(config.reference.cache, say=say)
    errors.require_covers(
        max_train_steps=config.max_train_steps, pairs_per_step=config.batch.pairs_per_step, seed=config.seed
    )
    return errors


def with_reference_errors(
    feed: PairFeed, errors: ReferenceErrors, *, config: RunConfig, start: StartOfPolicy | None, precision: Precision
) -> PairFeed:
    """Return a feed whose pairs come with the reference's errors; every rank calls it. start: needed on rank 0.

    Raises ConfigError on all ranks that names each part in which the cache is not what the run needs.
    """
    with raised_everywhere():
        if is_main():
            assert start is not None, "rank 0"
            errors.require_fits(fingerprint_of(config, feed, start, precision=precision))
    return replace(feed, pairs=PairsWithReferenceErrors(feed.pairs, errors))
