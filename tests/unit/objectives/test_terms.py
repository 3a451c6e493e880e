"""Terms that are added to an objective: the sft term and the anchor."""

import pytest
from pairs_of_numbers import FIELDS, Pair, as_errors, gradients, some_pairs

from ds_dpo.objectives.losses import OBJECTIVES, anchor, dpo, with_terms


def test_terms_add_to_value_and_gradient() -> None:
    pairs = some_pairs(5)
    plain, more = as_errors(pairs), as_errors(pairs)
    objective = with_terms(OBJECTIVES["dpo"], sft_weight=0.3, anchor_weight=0.7)
    alone, together = dpo(plain, beta=500), objective.loss(more, beta=500)
    by_hand = [0.3 * pair.m_w + 0.7 * (pair.s_w + pair.s_l) / 2 for pair in pairs]
    assert (together - alone).tolist() == pytest.approx(by_hand, rel=1e-10)
    own, found = gradients(alone, plain), gradients(together, more)
    added = {"policy_chosen_error": 0.3, "chosen_distance": 0.35, "rejected_distance": 0.35}
    for field in FIELDS:
        assert (found[field] - own[field]).tolist() == pytest.approx([added.get(field, 0.0)] * 5, abs=1e-12)


def test_terms_say_what_they_need() -> None:
    assert with_terms(OBJECTIVES["dpo"], sft_weight=0, anchor_weight=0) is OBJECTIVES["dpo"]
    assert with_terms(OBJECTIVES["dpo"], sft_weight=1, anchor_weight=0).reference == "errors"
    assert with_terms(OBJECTIVES["dpo"], sft_weight=0, anchor_weight=1).reference == "predictions"
    assert with_terms(OBJECTIVES["mapo"], sft_weight=1, anchor_weight=0).reference == "none"
    assert anchor(as_errors([Pair(0, 0, 0, 0, 0, 0.2, 0.4)])).item() == pytest.approx(0.3)
