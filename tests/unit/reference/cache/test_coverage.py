"""Whether a cache holds the pair visits of a run, and what a run that needs more is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from numbered_pairs import PAIRS_PER_STEP, SEED, NumberedPairs, make

from ds_dpo.data.stream.order import PairOrder
from ds_dpo.errors import ConfigError
from ds_dpo.reference.cache.errors import ReferenceErrors


def covers(errors: ReferenceErrors, *, steps: int, pairs_per_step: int = PAIRS_PER_STEP) -> None:
    errors.require_covers(max_train_steps=steps, pairs_per_step=pairs_per_step, seed=SEED)


def test_a_longer_run_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=4)
    for steps, pairs_per_step in ((4, 4), (1, 4), (2, 8), (1, 16), (5, 3)):
        covers(errors, steps=steps, pairs_per_step=pairs_per_step)
    with pytest.raises(ConfigError) as caught:
        covers(errors, steps=6)
    for said in ("lacks 8 of the 24", "max_train_steps 6", "--visits 3", "train with max_train_steps 4"):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"lacks 2 of the 18.*train with max_train_steps 2"):
        covers(errors, steps=3, pairs_per_step=6)


def test_whole_visits_fit_any_run_that_comes_to_no_more(tmp_path: Path) -> None:
    square = make(tmp_path / "square", NumberedPairs((11,)), visits=2)
    covers(square, steps=5)
    covers(square, steps=2, pairs_per_step=11)
    with pytest.raises(ConfigError, match="lacks 2 of the 24"):
        covers(square, steps=6)
    buckets = make(tmp_path / "buckets", NumberedPairs((7, 4)), visits=2)
    for pairs_per_step in (2, 4, 8):
        met_twice = 0
        while max(visit for _, visit in met_by(pairs_per_step, met_twice + 1)) < 2:
            met_twice += 1
        covers(buckets, steps=met_twice, pairs_per_step=pairs_per_step)
        with pytest.raises(ConfigError, match="lacks"):
            covers(buckets, steps=met_twice + 1, pairs_per_step=pairs_per_step)


def met_by(pairs_per_step: int, steps: int) -> list[tuple[int, int]]:
    order = PairOrder((7, 4), pairs_per_step=pairs_per_step, seed=SEED)
    return [order.place(position) for position in range(steps * pairs_per_step)]


def test_with_buckets_the_steps_of_another_size_are_of_other_pairs(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((7, 4)), steps=4)
    covers(errors, steps=4)
    with pytest.raises(ConfigError, match="lacks 16 of the 16"):
        covers(errors, steps=8, pairs_per_step=2)


@pytest.mark.parametrize("sizes", [(11,), (7, 4), (40, 3, 9)])
@pytest.mark.parametrize("pairs_per_step", [1, 4, 16])
def test_visits_begun_are_those_of_the_positions(sizes: tuple[int, ...], pairs_per_step: int) -> None:
    order = PairOrder(sizes, pairs_per_step=pairs_per_step, seed=SEED)
    starts = [sum(sizes[:bucket]) for bucket in range(len(sizes))]
    most = [0] * len(sizes)
    for step in range(60):
        assert order.visits_begun(step) == most
        for position in range(step * pairs_per_step, (step + 1) * pairs_per_step):
            index, visit = order.place(position)
            bucket = max(bucket for bucket, start in enumerate(starts) if start <= index)
            most[bucket] = max(most[bucket], visit + 1)
