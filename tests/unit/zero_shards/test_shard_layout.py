"""Where parameters lie in the shards, derived by hand."""

import pytest

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.layout import Placement, Span, place_cut_group, place_split_parameters, spans_within

SHAPES = {"weight": (2, 3), "bias": (3,)}


def test_zero_2_cuts_the_vector_of_a_group():
    # w w w w w | w b b b _ : 9 elements filled up to a multiple of 4 = 2 * 2 ranks, the padding not saved
    placements = place_cut_group(SHAPES, group=4, part_sizes=[5, 4], paddings=None)
    assert placements == {
        "weight": Placement((2, 3), (Span(0, 4, 0, 5), Span(1, 4, 0, 1))),
        "bias": Placement((3,), (Span(1, 4, 1, 4),)),
    }


def test_zero_2_leaves_gaps_after_aligned_parameters():
    # w w w w w w | _ _ b b b _
    placements = place_cut_group(SHAPES, group=0, part_sizes=[6, 6], paddings=[2, 0])
    assert placements["weight"].spans == (Span(0, 0, 0, 6),)
    assert placements["bias"].spans == (Span(1, 0, 2, 5),)


def test_zero_3_splits_each_parameter():
    # rank 0: w w b, rank 1: w w b, rank 2: w w b; with 4 elements of bias rank 2 would hold padding
    assert place_split_parameters(SHAPES, group=1, part_sizes=[3, 3, 3]) == {
        "weight": Placement((2, 3), (Span(0, 1, 0, 2), Span(1, 1, 0, 2), Span(2, 1, 0, 2))),
        "bias": Placement((3,), (Span(0, 1, 2, 3), Span(1, 1, 2, 3), Span(2, 1, 2, 3))),
    }
    padded = place_split_parameters({"bias": (4,)}, group=0, part_sizes=[2, 2, 2])
    assert padded["bias"].spans == (Span(0, 0, 0, 2), Span(1, 0, 0, 2))


def test_elements_of_a_parameter_are_found_in_its_spans():
    weight = Placement((3, 3), (Span(0, 0, 7, 10), Span(1, 0, 0, 4), Span(2, 0, 0, 2)))
    assert spans_within(weight, 0, 9) == list(weight.spans)
    assert spans_within(weight, 2, 8) == [Span(0, 0, 9, 10), Span(1, 0, 0, 4), Span(2, 0, 0, 1)]
    assert spans_within(weight, 4, 6) == [Span(1, 0, 1, 3)]
    assert spans_within(weight, 3, 3) == []


@pytest.mark.parametrize("part_sizes", [[4, 4], [7, 6]])
def test_zero_2_counts_must_add_up(part_sizes):
    with pytest.raises(CheckpointError, match=rf"group 0.* hold {sum(part_sizes)} .* need 9"):
        place_cut_group(SHAPES, group=0, part_sizes=part_sizes, paddings=None)


def test_zero_3_counts_must_add_up_on_every_rank():
    with pytest.raises(CheckpointError, match=r"hold 4 .* need 3"):
        place_split_parameters(SHAPES, group=0, part_sizes=[3, 3, 4])
