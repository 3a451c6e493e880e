"""The miniature's world: one coloured shape on a plain background, drawn at 32 x 32 pixels from a caption of words.

A caption names colour, shape and background. Everything else (size, place, vividness of the colour) varies, and only a
given share of the drawings has the caption's colour: so a model that learns this world can still be improved by
preferences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 32
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.75, 0.18),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.88, 0.10),
    "magenta": (0.90, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
BACKGROUNDS = {"black": 0.06, "gray": 0.45, "white": 0.94}
SHAPES = ("circle", "square", "triangle", "cross")

COLOUR_VALUES = torch.tensor(list(COLOURS.values()))
BACKGROUND_VALUES = torch.tensor(list(BACKGROUNDS.values()))


@dataclass(frozen=True)
class Caption:
    """What a caption names, as indices into COLOURS, SHAPES and BACKGROUNDS."""

    colour: int
    shape: int
    background: int

    def __str__(self) -> str:
        colour, background = list(COLOURS)[self.colour], list(BACKGROUNDS)[self.background]
        return f"a {colour} {SHAPES[self.shape]} on a {background} background"


CAPTIONS = tuple(
    Caption(c, s, b) for c in range(len(COLOURS)) for s in range(len(SHAPES)) for b in range(len(BACKGROUNDS))
)
CAPTION_OF_PROMPT = {str(caption): caption for caption in CAPTIONS}


def _is_test(caption: Caption) -> bool:
    """Return whether a caption is for tests: one background per (colour, shape), so that training has every word."""
    return (caption.colour + caption.shape) % len(BACKGROUNDS) == caption.background


PROMPTS = tuple(CAPTION_OF_PROMPT)
TRAIN_PROMPTS = tuple(prompt for prompt, caption in CAPTION_OF_PROMPT.items() if not _is_test(caption))
TEST_PROMPTS = tuple(prompt for prompt, caption in CAPTION_OF_PROMPT.items() if _is_test(caption))


def caption_indices(prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return colour, shape and background index of each prompt, (N,) each. Raises ValueError for other prompts."""
    unknown = next((prompt for prompt in prompts if prompt not in CAPTION_OF_PROMPT), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is not a prompt of the miniature, such as {PROMPTS[0]!r}")
    captions = [CAPTION_OF_PROMPT[prompt] for prompt in prompts]
    rows = torch.tensor([(c.colour, c.shape, c.background) for c in captions]).reshape(-1, 3)
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-6) - radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    half = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
    sides = [y, (math.sqrt(3) * x - y) / 2, (-math.sqrt(3) * x - y) / 2]
    return torch.stack(sides).amax(0) - half


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    width = radius * math.sqrt(math.pi / 20)
    bars = (torch.maximum(x.abs() - 3 * width, y.abs() - width), torch.maximum(x.abs() - width, y.abs() - 3 * width))
    return torch.minimum(*bars)


# Signed distances (negative inside), one per name in SHAPES; all shapes have area pi * radius^2.
DISTANCES = (_circle, _square, _triangle, _cross)


def shape_coverage(shape: int, centre_x: Tensor, centre_y: Tensor, radius: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Return the share of each pixel that the shape covers, (N, size, size), from centres and radii (N,) in pixels."""
    pixels = torch.arange(size) + 0.5
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    distance = DISTANCES[shape](x - centre_x[:, None, None], y - centre_y[:, None, None], radius[:, None, None])
    return (0.5 - distance).clamp(0, 1)


def draw(prompts: Sequence[str], *, generator: torch.Generator, right_colour_share: float) -> Tensor:
    """Draw an image for each prompt: (N, 3, 32, 32) in 0..1.

    The colour is the caption's with probability `right_colour_share`, else one of the five others. The offset from the
    centre is up to 0.2 of the width, the vividness 0.45 to 1, the radius 0.15 to 0.24 of the width.
    """
    count = len(prompts)
    colour, shape, background = caption_indices(prompts)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*(shape or (count,)), generator=generator)

    wrong = (colour + torch.randint(1, len(COLOURS), (count,), generator=generator)) % len(COLOURS)
    drawn = torch.where(uniform() < right_colour_share, colour, wrong)
    radius = IMAGE_SIZE * (0.15 + 0.09 * uniform())
    angle, offset = 2 * math.pi * uniform(), 0.20 * IMAGE_SIZE * uniform()
    centre_x = IMAGE_SIZE / 2 + offset * angle.cos()
    centre_y = IMAGE_SIZE / 2 + offset * angle.sin()
    coverage = torch.zeros(count, IMAGE_SIZE, IMAGE_SIZE)
    for index in range(len(SHAPES)):
        chosen = shape == index
        coverage[chosen] = shape_coverage(index, centre_x[chosen], centre_y[chosen], radius[chosen])
    back = (BACKGROUND_VALUES[background] + 0.05 * (uniform() - 0.5))[:, None]
    vividness = 0.45 + 0.55 * uniform()
    front = COLOUR_VALUES[drawn] + 0.06 * (uniform(count, 3) - 0.5)
    front = back + vividness[:, None] * (front - back)
    mask = coverage[:, None]
    images = back[:, :, None, None] * (1 - mask) + front[:, :, None, None] * mask
    return (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
