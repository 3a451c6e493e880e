"""The samples of a pair under given draws: flips, crops, time ids, the prompt, and images that cannot be used."""

from dataclasses import replace

import pytest
import torch
from pair_files import config, picture

from ds_dpo.data.source import BadRowError, PairRecord
from ds_dpo.data.stream.draws import draw_pair
from ds_dpo.data.stream.prepare import prepare_pair
from ds_dpo.diffusion.noising import Noising


def draws(**changes):
    drawn = draw_pair(seed=0, pair_id=5, visit=0, latent_shape=(4, 2, 2), noising=Noising.plain(1000))
    return replace(drawn, **changes)


def prepared(pair, drawn, *, size=(16, 16), **fields):
    return prepare_pair(pair, drawn, data=config(**fields), size=size)


def record(**changes):
    same = picture(4, width=32, height=16)
    return replace(PairRecord(prompt="a cat", chosen=same, rejected=same, pair_id=5, uid="row 9"), **changes)


@pytest.mark.parametrize(
    ("flip", "chosen_flip", "rejected_flip", "expected"),
    [
        ("off", 0.1, 0.1, (False, False)),
        ("shared", 0.1, 0.9, (True, True)),
        ("shared", 0.9, 0.1, (False, False)),
        ("independent", 0.1, 0.9, (True, False)),
        ("independent", 0.9, 0.1, (False, True)),
        ("independent", 0.5, 0.49, (False, True)),
    ],
)
def test_flips(flip, chosen_flip, rejected_flip, expected):
    drawn = draws(chosen_flip=chosen_flip, rejected_flip=rejected_flip)
    samples = prepared(record(), drawn, flip=flip)
    plain = prepared(record(), drawn).chosen_pixels
    for pixels, is_flipped in zip((samples.chosen_pixels, samples.rejected_pixels), expected, strict=True):
        assert torch.equal(pixels, plain.flip(-1) if is_flipped else plain)


def test_a_random_crop_is_shared_by_both_images():
    samples = prepared(record(), draws(), crop="random", size_conditioning="true")
    centre = prepared(record(), draws(), crop="center")
    assert torch.equal(samples.chosen_pixels, samples.rejected_pixels)
    assert not torch.equal(samples.chosen_pixels, centre.chosen_pixels)
    # of sizes that differ, it is the same fraction: places 0..16 of one, 0..32 of the other
    wide = picture(4, width=48, height=16)
    corners = prepared(record(rejected=wide), draws(crop_left=0.5), crop="random", size_conditioning="true")
    assert (corners.chosen_time_ids[0, 3], corners.rejected_time_ids[0, 3]) == (8, 16)


def test_time_ids_fixed_and_true():
    pair = record(rejected=picture(4, width=24, height=48))
    fixed = prepared(pair, draws())
    assert fixed.chosen_time_ids.tolist() == fixed.rejected_time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    true = prepared(pair, draws(), size_conditioning="true")
    # chosen: 16 x 32 (height x width), not resized, centre at left 8; rejected: 48 x 24 -> 32 x 16, centre at top 8
    assert true.chosen_time_ids.tolist() == [[16, 32, 0, 8, 16, 16]]
    assert true.rejected_time_ids.tolist() == [[48, 24, 8, 0, 16, 16]]
    assert true.chosen_time_ids.dtype == torch.float32


def test_time_ids_of_a_rectangle():
    pair = record(rejected=picture(4, width=24, height=48))
    fixed = prepared(pair, draws(), size=(24, 16))
    assert fixed.chosen_time_ids.tolist() == fixed.rejected_time_ids.tolist() == [[24, 16, 0, 0, 24, 16]]
    true = prepared(pair, draws(), size=(24, 16), size_conditioning="true")
    # chosen: 16 x 32 -> 24 x 48, centre at left 16; rejected: 48 x 24 -> 32 x 16, centre at top 4
    assert true.chosen_time_ids.tolist() == [[16, 32, 0, 16, 24, 16]]
    assert true.rejected_time_ids.tolist() == [[48, 24, 4, 0, 24, 16]]


def test_a_prompt_is_dropped_below_its_share():
    assert prepared(record(), draws(prompt_dropout=0.3), prompt_dropout=0.2).prompts == ["a cat"]
    assert prepared(record(), draws(prompt_dropout=0.1), prompt_dropout=0.2).prompts == [""]
    assert prepared(record(), draws(prompt_dropout=0.0), prompt_dropout=0.0).prompts == ["a cat"]
    assert prepared(record(), draws(prompt_dropout=0.999), prompt_dropout=1.0).prompts == [""]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_bad_image_names_row_side_and_reason(side):
    with pytest.raises(BadRowError, match=f"row 9: {side} image: empty: 0 bytes") as caught:
        prepared(record(**{side: b""}), draws())
    assert (caught.value.bad_row.uid, caught.value.bad_row.reason) == ("row 9", f"{side} image: empty: 0 bytes")
