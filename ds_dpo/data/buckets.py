"""Aspect-ratio buckets: the few sizes of training images, and the choice of one for each pair.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ds_dpo.errors import DataError


def bucket_shapes(resolution: int, *, step: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """Return the sizes of all buckets, from the widest to the tallest, with the square in the middle.

    Sides are multiples of step. Each longer side above the resolution gets the longest shorter side with which the
    image has at most resolution x resolution pixels, if their ratio is at most max_aspect. At 1024 with step 64, SDXL
    was trained at each of these sizes. Raises DataError if the resolution is not a multiple of step.
    Source: arXiv:2307.01952, appendix I.
    """
    if resolution % step:
        above = (resolution // step + 1) * step
        raise DataError(
            f"data.resolution {resolution} is not a multiple of data.bucket_step {step}: resolution {above} would fit"
        )
    wide = []
    for longer in range(resolution + step, resolution * resolution // step + 1, step):
        shorter = resolution * resolution // longer // step * step
        if longer <= max_aspect * shorter:
            wide.append((shorter, longer))
    wide.sort(key=lambda size: size[0] / size[1])
    return (*wide, (resolution, resolution), *((width, height) for height, width in reversed(wide)))


def choose_bucket(
    chosen_size: tuple[int, int], rejected_size: tuple[int, int], shapes: Sequence[tuple[int, int]]
) -> int:
    """Return the index of the bucket whose log aspect ratio is nearest to the mean of both images' log aspect ratios.

    shapes: as bucket_shapes returns them. With this mean, on average neither image is cut more than the other, which
    would tell chosen from rejected. It is computed in integers, so it is the same on every machine: the mean is above
    the middle of two neighbouring buckets if the product of the images' ratios is above the product of the buckets'.
    """
    height, width = chosen_size[0] * rejected_size[0], chosen_size[1] * rejected_size[1]
    return sum(height * a[1] * b[1] > width * a[0] * b[0] for a, b in pairwise(shapes))
