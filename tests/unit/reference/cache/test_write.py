"""Making a cache of reference errors, extending it for a longer run, and refusing another one's folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_pairs import LAYOUTS, PAIRS_PER_STEP, SEED, Computing, NumberedPairs, make
from torch import Tensor

from ds_dpo.batch import DrawnPairs
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.errors import ConfigError, DataError


def files_of(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_only_what_the_run_meets_is_computed_and_each_once(tmp_path: Path) -> None:
    computing, pairs = Computing(), NumberedPairs((11,))
    errors = make(tmp_path / "cache", pairs, steps=4, computing=computing)
    places = [place for batch in computing.batches for place in batch]
    order = PairOrder((11,), pairs_per_step=PAIRS_PER_STEP, seed=SEED)
    assert places == [order.place(position) for position in range(16)], "one epoch of 11 and 5 pairs of the next"
    assert errors.record.num_computed == 16
    assert errors.record.num_visits == 2


def test_pairs_of_a_batch_share_a_bucket_and_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    for asked in ({"steps": 7}, {"visits": 2}):
        found = []
        for workers in (0, 2):
            computing = Computing()
            out = tmp_path / f"{next(iter(asked))}_{workers}"
            make(out, NumberedPairs((7, 4), [1]), computing=computing, workers=workers, **asked)
            found.append(computing.batches)
        assert found[0] == found[1]
        for batch in found[0]:
            assert len({index >= 7 for index, _ in batch}) == 1
            assert len(batch) <= 3


def test_two_numbers_are_stored_of_each_pair_and_visit(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), visits=3)
    header = 128
    assert (errors.folder / errors.record.table).stat().st_size == header + 3 * 11 * 8


def test_errors_that_are_not_finite_end_the_making(tmp_path: Path) -> None:
    def broken(samples: DrawnPairs) -> tuple[Tensor, Tensor]:
        return torch.full((len(samples.pair_ids),), float("nan")), torch.ones(len(samples.pair_ids))

    computing: Any = broken
    with pytest.raises(DataError, match="NaN or infinite"):
        make(tmp_path / "cache", NumberedPairs((11,)), steps=1, computing=computing)
    assert not (tmp_path / "cache" / "reference.json").exists()


# ---- going on, extending, refusing ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["steps", "visits"])
def test_an_extended_cache_is_the_longer_one_to_the_byte(tmp_path: Path, layout: str, kind: str) -> None:
    pairs = NumberedPairs(LAYOUTS[layout], [1])
    shorter, longer = {kind: 2}, {kind: 4}
    asked: Any = longer
    make(tmp_path / "whole", pairs, **asked)
    asked = shorter
    make(tmp_path / "grown", pairs, **asked)
    said: list[str] = []
    computing = Computing()
    asked = longer
    make(tmp_path / "grown", pairs, said=said, computing=computing, **asked)
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "whole")
    assert said[0].startswith("extending")
    whole = Computing()
    make(tmp_path / "again", pairs, computing=whole, **asked)
    assert 0 < len(computing.batches) < len(whole.batches), "what was there is not computed again"


def test_a_finished_cache_is_left_as_it_is(tmp_path: Path) -> None:
    pairs = NumberedPairs((11,))
    make(tmp_path / "cache", pairs, steps=4)
    before = files_of(tmp_path / "cache")
    for steps in (4, 2):
        said: list[str] = []
        computing = Computing()
        make(tmp_path / "cache", pairs, steps=steps, said=said, computing=computing)
        assert said == [f"{tmp_path / 'cache'} is finished already; nothing is computed"]
        assert not computing.batches
    assert files_of(tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": {"unet": "xyz"}}, "fingerprint.unet: the cache has abc, this command xyz"),
        ({"shard_pairs": 8}, "shard_pairs: the cache has 6, this command 8"),
        ({"batch_pairs": 2}, "batch_pairs: the cache has 3, this command 2"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    pairs = NumberedPairs((11,))
    make(tmp_path / "cache", pairs, steps=2)
    before = files_of(tmp_path / "cache")
    with pytest.raises(ConfigError, match=said):
        make(tmp_path / "cache", pairs, steps=4, **changes)
    assert files_of(tmp_path / "cache") == before
