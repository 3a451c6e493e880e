"""The buckets' sizes, and which of them a pair is cut to: by both images alike."""

import math
import random

import pytest

from ds_dpo.data.buckets import bucket_shapes, choose_bucket
from ds_dpo.errors import DataError

SDXL = bucket_shapes(1024, step=64, max_aspect=2.0)


def test_the_table_at_1024():
    wide = [(704, 1408), (768, 1344), (768, 1280), (832, 1216), (896, 1152), (960, 1088)]
    tall = [(width, height) for height, width in reversed(wide)]
    assert (*wide, (1024, 1024), *tall) == SDXL


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
@pytest.mark.parametrize("step", [8, 64])
@pytest.mark.parametrize("max_aspect", [1.0, 1.5, 2.0, 4.0])
def test_every_table(resolution, step, max_aspect):
    shapes = bucket_shapes(resolution, step=step, max_aspect=max_aspect)
    assert (resolution, resolution) in shapes
    assert len(set(shapes)) == len(shapes)
    assert {(width, height) for height, width in shapes} == set(shapes)
    ratios = [height / width for height, width in shapes]
    assert ratios == sorted(ratios)
    assert ratios[-1] <= max_aspect
    for height, width in shapes:
        assert height % step == width % step == 0
        # with another step on the shorter side there would be too many pixels
        assert height * width <= resolution**2 < (min(height, width) + step) * max(height, width)


def test_no_aspect_but_the_square():
    assert bucket_shapes(512, step=64, max_aspect=1.0) == ((512, 512),)


def test_a_resolution_that_the_step_does_not_divide_is_refused():
    with pytest.raises(
        DataError, match=r"resolution 1000 is not a multiple of data.bucket_step 64: resolution 1024 would fit"
    ):
        bucket_shapes(1000, step=64, max_aspect=2.0)
    with pytest.raises(DataError, match="resolution 64 would fit"):
        bucket_shapes(16, step=64, max_aspect=2.0)


def nearest(chosen, rejected, shapes):
    """The same in floating point, by trying all."""
    target = (math.log(chosen[0] / chosen[1]) + math.log(rejected[0] / rejected[1])) / 2
    distances = [abs(math.log(height / width) - target) for height, width in shapes]
    return distances.index(min(distances))


def test_the_nearest_ratio_to_the_mean_of_both_is_chosen():
    draw = random.Random(0)
    for _ in range(3000):
        sizes = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(2)]
        assert choose_bucket(*sizes, SDXL) == nearest(*sizes, SDXL)


def test_which_image_was_chosen_does_not_matter():
    draw = random.Random(1)
    for _ in range(500):
        a, b = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(2)]
        assert choose_bucket(a, b, SDXL) == choose_bucket(b, a, SDXL)


def test_images_of_a_bucket_s_own_ratio_are_in_it_at_any_size():
    for bucket, (height, width) in enumerate(SDXL):
        assert choose_bucket((height, width), (3 * height, 3 * width), SDXL) == bucket


def test_opposite_ratios_meet_in_the_square():
    assert SDXL[choose_bucket((300, 600), (1000, 500), SDXL)] == (1024, 1024)


def test_beyond_the_table_the_most_extreme_bucket_is_taken():
    assert choose_bucket((1, 10_000), (1, 10_000), SDXL) == 0
    assert choose_bucket((10_000, 1), (10_000, 1), SDXL) == len(SDXL) - 1


def test_the_border_lies_at_the_geometric_mean_and_belongs_to_the_wider():
    shapes = ((1, 4), (1, 1))  # 1 / 4 and 1, so 1 / 2
    assert choose_bucket((500, 1000), (500, 1000), shapes) == 0
    assert choose_bucket((501, 1000), (500, 1000), shapes) == 1


def test_one_bucket():
    assert choose_bucket((1, 9), (5, 2), ((512, 512),)) == 0
