"""PairErrors hold what an objective asks for and nothing else."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_forms import CLOSED_FORMS
from pairs_of_numbers import FIELDS, Pair, as_errors, some_pairs
from torch import Tensor

from ds_dpo.objectives.losses import OBJECTIVES, dpo
from ds_dpo.objectives.pair_errors import PairErrors


class Recorded(dict[Any, Tensor]):
    """Quantities that remember which of them were read."""

    def __init__(self, values: Mapping[Any, Tensor]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_asks_for_exactly_what_its_loss_reads(name: str) -> None:
    objective, options = OBJECTIVES[name], CLOSED_FORMS[name][1][-1]
    errors = as_errors(some_pairs(3))
    recorded = Recorded(errors.asked_for)
    objective.loss(replace(errors, asked_for=recorded), **options)
    read = recorded.read
    assert objective.uses_rejected == any("rejected" in one for one in read)
    assert objective.uses_reference == any("difference" in one or "distance" in one for one in read)
    assert (objective.reference == "predictions") == any("distance" in one for one in read)
    assert objective.uses_residual_product == ("residual_product" in read)
    if objective.quantities is not None:
        objective.quantities(replace(errors, asked_for=recorded), **options)
        assert recorded.read == read, "what a log shows costs no more"


def test_what_was_not_asked_for_is_named() -> None:
    errors = PairErrors(policy_chosen_error=torch.ones(1), target_probability=torch.ones(1))
    with pytest.raises(LookupError, match=r"chosen_difference was not computed; .* chosen errors alone"):
        dpo(errors, beta=1.0)
    compared = errors.with_quantity("chosen_difference", torch.zeros(1))
    with pytest.raises(LookupError, match=r"rejected_difference was not computed; .*\(computed: chosen_difference\)"):
        dpo(compared, beta=1.0)


def test_a_weight_acts_on_every_error_and_on_no_target() -> None:
    pair = Pair(1, 2, 3, 4, 5, 6, 7, target=0.5)
    weighted = as_errors([pair]).weighted(torch.tensor([0.5], dtype=torch.float64))
    assert [getattr(weighted, field).item() for field in FIELDS] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert weighted.target_probability.item() == 0.5
    assert weighted.difference_gap.item() == -0.5
