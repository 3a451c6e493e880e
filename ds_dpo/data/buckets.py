"""Aspect-ratio buckets: the few sizes that training images have, and which of them a pair is cut to.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ds_dpo.errors import DataError


def bucket_shapes(resolution: int, *, step: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """Return the sizes of all buckets, from the widest to the tallest, the square in their middle.

    Sides are multiples of step. For each longer side from the resolution on, the shorter one is the longest with which
    the image has no more than resolution x resolution pixels, as long as their ratio is not above max_aspect. Raises
    DataError where the resolution is not a multiple of step. At 1024 with step 64 each of them is one that SDXL was
    trained at. Source: arXiv:2307.01952, appendix I.
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
    """Return the index of the bucket whose aspect ratio is nearest, in its logarithm, to the mean of both images'.

    shapes: as bucket_shapes returns them. The mean is that of the logarithms, so that neither side is cut more than the
    other on average, which would tell them apart. In integers alone, hence the same on every machine: the mean lies
    above the middle of two neighbours where the product of both images' ratios is above the product of theirs.
    """
    height, width = chosen_size[0] * rejected_size[0], chosen_size[1] * rejected_size[1]
    return sum(height * a[1] * b[1] > width * a[0] * b[0] for a, b in pairwise(shapes))
