"""A run finds in a cache the errors of the pairs that it reads; what is bad, missing or damaged is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_pairs import LAYOUTS, PAIRS_PER_STEP, SEED, Computing, NumberedPairs, errors_by_hand, make

from ds_dpo.config.load import load_config
from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.loader import open_stream
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.reference.cache.errors import PairsWithReferenceErrors, ReferenceErrors


def trained(pairs: Any, *, steps: int, pairs_per_step: int = PAIRS_PER_STEP, max_bad_rows: int = 100) -> list[Any]:
    """Every sample that a run's loader gives."""
    data = load_config(
        ["--config", "miniature", "--data.workers", "0", "--data.max_bad_rows", str(max_bad_rows)]
    ).config.data
    stream = open_stream(
        pairs,
        data=data,
        seed=SEED,
        pairs_per_step=pairs_per_step,
        micro_batch_pairs=1,
        rank=0,
        world_size=1,
        pairs_seen=0,
        say=lambda line: None,
    )
    batches = iter(stream)
    return [next(batches) for _ in range(steps * pairs_per_step)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [[], [1, 8]], ids=["good", "bad"])
@pytest.mark.parametrize("asked", [{"steps": 7}, {"visits": 4}], ids=["steps", "visits"])
def test_a_run_finds_the_errors_of_all_that_it_meets(tmp_path: Path, layout: str, bad: list[int], asked: Any) -> None:
    pairs = NumberedPairs(LAYOUTS[layout], bad)
    cached = PairsWithReferenceErrors(pairs, make(tmp_path / "cache", pairs, **asked))
    found, expected = trained(cached, steps=7), trained(pairs, steps=7)
    assert [sample.pair_ids for sample in found] == [sample.pair_ids for sample in expected], "other pairs than without"
    visits = set()
    for sample in found:
        ((index,), (visit,)) = Computing.names(sample)
        visits.add(visit)
        read = sample.reference_chosen_error.item(), sample.reference_rejected_error.item()
        assert read == errors_by_hand(int(index), int(visit))
        assert sample.reference_chosen_error.dtype == torch.float32
    assert visits >= {0, 1}


def test_a_pair_that_was_bad_is_replaced_as_it_was_then(tmp_path: Path) -> None:
    sick = NumberedPairs((11,), [1, 8])
    errors = make(tmp_path / "cache", sick, steps=7)
    assert 4 <= errors.record.num_bad <= 6, "two pairs in two whole visits and a part of the third"
    healthy = NumberedPairs((11,))
    found = trained(PairsWithReferenceErrors(healthy, errors), steps=7)
    expected = trained(sick, steps=7)
    assert [sample.pair_ids for sample in found] == [sample.pair_ids for sample in expected]
    with pytest.raises(BadRowError, match="pair 8: it could not be read when"):
        errors.read(8, 0)


def test_a_stand_in_that_nobody_foresaw_is_an_error_that_says_so(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=4)
    second_visit = {index for index, visit in met((11,), 16) if visit == 1}
    absent = next(index for index in range(11) if index not in second_visit)
    with pytest.raises(DataError, match=f"no reference error of pair {absent} in visit 1") as caught:
        errors.read(absent, 1)
    assert not isinstance(caught.value, BadRowError)
    with pytest.raises(DataError, match="in visit 2"):
        errors.read(0, 2)


def met(sizes: Sequence[int], positions: int) -> list[tuple[int, int]]:
    order = PairOrder(sizes, pairs_per_step=PAIRS_PER_STEP, seed=SEED)
    return [order.place(position) for position in range(positions)]


def test_damage_is_found_when_it_is_opened(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=2)
    table = errors.folder / errors.record.table
    table.write_bytes(table.read_bytes()[:-8])
    with pytest.raises(DataError, match="cut short"):
        ReferenceErrors(errors.folder)
    table.unlink()
    with pytest.raises(DataError, match="missing, but the cache's record lists it"):
        ReferenceErrors(errors.folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"scripts/cache\.py --reference makes one"):
        ReferenceErrors(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reference.residency", "cached"], "needs reference.cache"),
        (["--reference.cache", "x"], "residency replicated ignores reference.cache x"),
        (["--reference.residency", "cached", "--reference.cache", "x", "--objective.type", "sft"], "has no reference"),
        (
            ["--reference.residency", "cached", "--reference.cache", "x", "--reference.preflight", "near"],
            "reference.preflight near has no effect with reference.residency cached",
        ),
        (
            ["--reference.residency", "cached", "--reference.cache", "x", "--terms.anchor_weight", "1"],
            "terms.anchor_weight 1 needs the reference's predictions",
        ),
    ],
)
def test_a_configuration_that_cannot_read_errors_is_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(["--config", "miniature", *options])
