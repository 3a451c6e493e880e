"""The miniature's ground-truth reward, measured from pixels and caption alone: no model, no loss.

reward = [colour is the caption's] + vividness / 2 + centredness / 2, from 0 to 2; 0 for an image that is not one clean
object. Background and shape do not count, so that they can show side effects of training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ds_dpo.miniature.world import BACKGROUND_VALUES, COLOUR_VALUES, SHAPES, caption_indices, shape_coverage

MAX_REWARD = 2.0


@dataclass(frozen=True)
class Measurement:
    """What was measured of N images; each field is (N,).

    reward: 0..2. valid: one clean flat object. background, shape, colour_right: as the caption says. vividness: 0
    (faded into the background) to 1. offset: distance from the centre as a share of the width.
    """

    reward: Tensor
    valid: Tensor
    background: Tensor
    shape: Tensor
    colour_right: Tensor
    vividness: Tensor
    offset: Tensor


@torch.no_grad()
def measure(images: Tensor, captions: Sequence[str]) -> Measurement:
    """Measure images (N, 3, S, S) in 0..1 against their captions; ValueError for a caption of another world."""
    images = images.float().clamp(0, 1)
    size = images.shape[-1]
    colour, shape, background = caption_indices(captions)

    back = _border_median(images)
    back_grey = back.mean(1, keepdim=True)
    mask = _object_mask(images, back)
    area = mask.sum((1, 2))
    pixels = area.clamp_min(1)
    front = (images * mask[:, None]).sum((2, 3)) / pixels[:, None]

    # The object's difference from the background, against what each colour would give on that background.
    difference = front - back_grey
    expected = COLOUR_VALUES[None] - back_grey[:, None]
    cosine = cosine_similarity(difference[:, None], expected, dim=2)
    seen_colour = cosine.argmax(1)
    strength = (difference[:, None] * expected).sum(2) / expected.square().sum(2)
    vividness = strength.gather(1, seen_colour[:, None])[:, 0].clamp(0, 1)

    centre_x, centre_y = _centre(mask, pixels)
    offset = torch.hypot(centre_x - size / 2, centre_y - size / 2) / size
    overlap = _template_overlap(mask, centre_x, centre_y, torch.sqrt(pixels / math.pi))
    spread = (((images - front[:, :, None, None]).square().mean(1) * mask).sum((1, 2)) / pixels).sqrt()
    share = area / (size * size)

    valid = (share > 0.03) & (share < 0.30) & (overlap.amax(1) > 0.70)
    valid &= (spread < 0.15) & (back.std(1) < 0.08) & (cosine.amax(1) > 0.9)
    colour_right = seen_colour == colour
    reward = colour_right + 0.5 * vividness + 0.5 * (1 - offset / 0.25).clamp(0, 1)
    return Measurement(
        reward=torch.where(valid, reward, 0.0),
        valid=valid,
        background=(back_grey[:, 0] - BACKGROUND_VALUES[background]).abs() < 0.15,
        shape=overlap.argmax(1) == shape,
        colour_right=colour_right,
        vividness=vividness,
        offset=offset,
    )


def _border_median(images: Tensor) -> Tensor:
    """Median colour of the two outermost pixels on each side: (N, 3)."""
    wide = max(2, images.shape[-1] // 16)
    sides = (images[:, :, :wide], images[:, :, -wide:], images[..., :wide], images[..., -wide:])
    return torch.cat([side.flatten(2) for side in sides], 2).median(2).values


def _object_mask(images: Tensor, back: Tensor) -> Tensor:
    """1 where a pixel is further from the background than half of the brightest difference, (N, S, S)."""
    distance = (images - back[:, :, None, None]).norm(dim=1)
    peak = torch.quantile(distance.flatten(1), 0.97, dim=1)
    return (distance > (0.5 * peak).clamp_min(0.12)[:, None, None]).float()


def _centre(mask: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(mask.shape[-1]) + 0.5
    return (mask.sum(1) * positions).sum(1) / pixels, (mask.sum(2) * positions).sum(1) / pixels


def _template_overlap(mask: Tensor, centre_x: Tensor, centre_y: Tensor, radius: Tensor) -> Tensor:
    """Intersection over union with each shape drawn at the object's own centre and area: (N, shapes)."""
    overlaps = []
    for index in range(len(SHAPES)):
        template = (shape_coverage(index, centre_x, centre_y, radius, mask.shape[-1]) > 0.5).float()
        union = ((template + mask) > 0).sum((1, 2)).clamp_min(1)
        overlaps.append((template * mask).sum((1, 2)) / union)
    return torch.stack(overlaps, 1)
