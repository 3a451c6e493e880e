"""Nameless master weights find their parameters only where there is one way to."""

import pytest
import torch

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.unzeroed import match_masters


def test_masters_find_their_roundings_around_frozen_weights():
    first, last = torch.tensor([1.001, 2.002]), torch.tensor([3.003, 4.004])
    weights = {"first": first.bfloat16(), "frozen": torch.tensor([7.0, 8.0]).bfloat16(), "last": last.bfloat16()}
    matched = match_masters(weights, [[first, last]], where="here")
    assert list(matched) == ["first", "last"]
    assert torch.equal(matched["first"], first)
    assert torch.equal(matched["last"], last)
    # two groups whose order is not the module's
    assert list(match_masters(weights, [[last], [first]], where="here")) == ["first", "last"]


def test_no_or_several_matchings_are_refused():
    master = torch.zeros(2)
    twins = {"trained": torch.zeros(2).bfloat16(), "frozen": torch.zeros(2).bfloat16()}
    with pytest.raises(CheckpointError, match="more than one"):
        match_masters(twins, [[master]], where="here")
    with pytest.raises(CheckpointError, match="in no way"):
        match_masters({"weight": torch.ones(2).bfloat16()}, [[master]], where="here")
