"""The reward finds in a picture what was put there. The pictures are PIL's, drawn from geometry alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ds_dpo.miniature.reward import MAX_REWARD, Measurement, measure
from ds_dpo.miniature.world import (
    BACKGROUNDS,
    COLOURS,
    PROMPTS,
    SHAPES,
    TEST_PROMPTS,
    TRAIN_PROMPTS,
    caption_indices,
    draw,
)

SIZE, SCALE = 32, 16  # pixels of a picture; PIL draws each 16 times as wide, for smooth edges


def outline(shape: str, area: float) -> list[tuple[float, float]]:
    """Corners around (0, 0) of a shape of that area; y points down, as in pictures."""
    if shape == "square":
        half = math.sqrt(area) / 2
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":  # equilateral, its centroid at 0, standing on a side
        side = math.sqrt(4 * area / math.sqrt(3))
        height = side * math.sqrt(3) / 2
        return [(0, -2 / 3 * height), (side / 2, height / 3), (-side / 2, height / 3)]
    if shape == "cross":  # five squares
        a = math.sqrt(area / 5) / 2
        arm = [(-a, -3 * a), (a, -3 * a), (a, -a), (3 * a, -a), (3 * a, a), (a, a)]
        return arm + [(-x, -y) for x, y in arm]
    radius, corners = math.sqrt(area / math.pi), 90
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def picture(
    colour: str,
    shape: str,
    background: str,
    *,
    vividness: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
    area_share: float = 0.12,
) -> Tensor:
    """(3, 32, 32) in 0..1. shift: of the centre, as shares of the width."""
    grey = BACKGROUNDS[background]
    fill = [grey + vividness * (value - grey) for value in COLOURS[colour]]
    canvas = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), tuple([round(255 * grey)] * 3))
    width = SIZE * SCALE
    corners = [
        (width * (0.5 + shift[0]) + SCALE * x, width * (0.5 + shift[1]) + SCALE * y)
        for x, y in outline(shape, area_share * SIZE * SIZE)
    ]
    ImageDraw.Draw(canvas).polygon(corners, fill=tuple(round(255 * value) for value in fill))
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def measure_one(image: Tensor, prompt: str) -> Measurement:
    return measure(image[None], [prompt])


def test_there_are_72_prompts_and_every_word_occurs_in_training() -> None:
    assert len(PROMPTS) == 72 == 6 * 4 * 3
    assert set(TRAIN_PROMPTS) | set(TEST_PROMPTS) == set(PROMPTS)
    assert set(TRAIN_PROMPTS) & set(TEST_PROMPTS) == set()
    assert len(TEST_PROMPTS) == 24
    assert {word for prompt in TRAIN_PROMPTS for word in prompt.split()} == {w for p in PROMPTS for w in p.split()}


def test_what_a_caption_names_is_found_in_its_picture() -> None:
    names = [(colour, shape, background) for colour in COLOURS for shape in SHAPES for background in BACKGROUNDS]
    prompts = [f"a {colour} {shape} on a {background} background" for colour, shape, background in names]
    found = measure(torch.stack([picture(*name) for name in names]), prompts)
    for quality in (found.valid, found.colour_right, found.shape, found.background):
        assert quality.all(), [prompt for prompt, good in zip(prompts, quality, strict=True) if not good]
    # perfect: right colour, as vivid as can be, in the centre
    assert found.reward.min() > 0.95 * MAX_REWARD
    assert found.reward.max() <= MAX_REWARD


def test_each_wrong_attribute_is_seen_and_only_colour_costs_reward() -> None:
    image = picture("red", "circle", "white")
    right = measure_one(image, "a red circle on a white background").reward.item()
    other_colour = measure_one(image, "a blue circle on a white background")
    assert (other_colour.colour_right.item(), other_colour.shape.item(), other_colour.background.item()) == (0, 1, 1)
    assert other_colour.reward.item() == pytest.approx(right - 1, abs=1e-6)
    other_shape = measure_one(image, "a red square on a white background")
    assert (other_shape.colour_right.item(), other_shape.shape.item(), other_shape.background.item()) == (1, 0, 1)
    other_background = measure_one(image, "a red circle on a black background")
    assert (other_background.shape.item(), other_background.background.item()) == (1, 0)
    assert other_shape.reward.item() == other_background.reward.item() == right


@pytest.mark.parametrize("vividness", [0.5, 0.75, 1.0])
@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (0.1, 0.0), (0.0, -0.2), (-0.09, 0.12)])
def test_vividness_and_offset_are_measured_and_paid(vividness: float, x: float, y: float) -> None:
    image = picture("green", "circle", "gray", vividness=vividness, shift=(x, y))
    found = measure_one(image, "a green circle on a gray background")
    offset = math.hypot(x, y)
    assert found.vividness.item() == pytest.approx(vividness, abs=0.1)  # its edge is mixed with the background
    assert found.offset.item() == pytest.approx(offset, abs=0.02)  # 0.64 pixels
    assert found.reward.item() == pytest.approx(1 + vividness / 2 + max(0, 1 - offset / 0.25) / 2, abs=0.1)


def broken_pictures() -> dict[str, Tensor]:
    circle = picture("red", "circle", "white")
    generator = torch.Generator().manual_seed(0)
    stripes = torch.arange(SIZE) // 4 % 2 == 1
    dark_red = torch.tensor([0.2, 0.0, 0.0]).view(3, 1, 1)
    two = torch.cat([picture("red", "circle", "white", shift=(-0.25, 0), area_share=0.06)[:, :, :16],
                     picture("red", "circle", "white", shift=(0.25, 0), area_share=0.06)[:, :, 16:]], 2)  # fmt: skip
    return {
        "nothing": torch.full((3, SIZE, SIZE), 0.94),
        "noise": torch.rand(3, SIZE, SIZE, generator=generator),
        "a speck": picture("red", "circle", "white", area_share=0.01),
        "too large": picture("red", "circle", "white", area_share=0.5),
        "two objects": two,
        "two colours": torch.cat([circle[:, :, :16], picture("blue", "circle", "white")[:, :, 16:]], 2),
        "striped": torch.where((circle[1] < 0.5) & stripes, dark_red, circle),
        "a coloured background": torch.where(circle > 0.9, torch.tensor([0.9, 0.5, 0.9]).view(3, 1, 1), circle),
    }


@pytest.mark.parametrize("name", broken_pictures())
def test_what_is_not_one_clean_object_gets_nothing(name: str) -> None:
    found = measure_one(broken_pictures()[name], "a red circle on a white background")
    assert (found.valid.item(), found.reward.item()) == (False, 0.0)


def test_drawings_are_what_their_captions_say_in_the_given_share() -> None:
    prompts = list(PROMPTS) * 4
    images = draw(prompts, generator=torch.Generator().manual_seed(1), right_colour_share=0.5)
    assert images.shape == (288, 3, 32, 32)
    assert (images.min() >= 0, images.max() <= 1) == (True, True)
    found = measure(images, prompts)
    assert found.valid.float().mean() > 0.98
    assert found.shape.float().mean() > 0.98
    assert found.background.float().mean() > 0.98
    # 288 draws at 0.5: 4 standard deviations are 0.118
    assert found.colour_right.float().mean().item() == pytest.approx(0.5, abs=0.118)
    always = draw(prompts, generator=torch.Generator().manual_seed(1), right_colour_share=1.0)
    assert measure(always, prompts).colour_right.all()


def test_a_drawing_is_a_function_of_its_generator() -> None:
    first, second = (
        draw(PROMPTS[:3], generator=torch.Generator().manual_seed(2), right_colour_share=0.5) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a red dog'.*'a red circle on a black background'"):
        caption_indices(["a red circle on a black background", "a red dog"])
