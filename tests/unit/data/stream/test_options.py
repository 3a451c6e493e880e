"""Order and draws depend on the seed, and an option moves only the tensors that it is about."""

import pytest
import torch
from pair_files import ListedPairs
from stream_steps import differing, steps_of, stream_of

SOURCE = ListedPairs(11)


@pytest.mark.parametrize(
    ("option", "moved"),
    [
        ({"flip": "shared"}, {"chosen_pixels", "rejected_pixels"}),
        ({"flip": "independent"}, {"chosen_pixels", "rejected_pixels"}),
        ({"crop": "random"}, {"chosen_pixels", "rejected_pixels"}),
        ({"prompt_dropout": 0.5}, {"prompts"}),
        ({"size_conditioning": "true"}, {"chosen_time_ids", "rejected_time_ids"}),
    ],
)
def test_an_option_moves_only_what_it_is_about(option, moved):
    assert differing(steps_of(SOURCE, 2), steps_of(SOURCE, 2, **option)) == moved


def test_another_size_moves_only_pixels_and_sizes():
    other = steps_of(ListedPairs(11, bucket_shapes=[(24, 16)]), 2)
    moved = {"chosen_pixels", "rejected_pixels", "chosen_time_ids", "rejected_time_ids"}
    assert differing(steps_of(SOURCE, 2), other) == moved


def test_shared_flips_are_shared_and_independent_ones_are_not():
    plain, shared, independent = (steps_of(SOURCE, 3, flip=flip) for flip in ("off", "shared", "independent"))

    def flipped(steps, side):
        pixels = [
            (a, b)
            for x, y in zip(plain, steps, strict=True)
            for a, b in zip(getattr(x, side), getattr(y, side), strict=True)
        ]
        assert all(torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in pixels)
        return [not torch.equal(a, b) for a, b in pixels]

    assert flipped(shared, "chosen_pixels") == flipped(shared, "rejected_pixels")
    assert flipped(shared, "chosen_pixels") == flipped(independent, "chosen_pixels")
    assert flipped(independent, "chosen_pixels") != flipped(independent, "rejected_pixels")
    assert 4 <= sum(flipped(shared, "chosen_pixels")) <= 20  # of 24


def test_the_seed_changes_order_and_draws():
    moved = differing(steps_of(SOURCE, 1, seed=3), steps_of(SOURCE, 1, seed=4))
    assert {"pair_ids", "noise", "timesteps"} <= moved


def test_reading_takes_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(iter(stream_of(SOURCE, workers=workers)))
    assert torch.equal(before, torch.get_rng_state())
