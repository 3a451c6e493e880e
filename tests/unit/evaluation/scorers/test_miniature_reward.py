import numpy as np
import pytest
from PIL import Image, ImageDraw

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import open_scorer

RED, BLUE = "a red circle on a black background", "a blue circle on a black background"


def drawing() -> Image.Image:
    image = Image.new("RGB", (32, 32), (15, 15, 15))
    ImageDraw.Draw(image).ellipse((10, 10, 21, 21), fill=(230, 31, 31))
    return image


def test_the_true_colour_is_worth_one() -> None:
    scorer = open_scorer(ScorerChoice(name="reward", kind="reward"), "cpu")
    right, wrong, blank = scorer.score([drawing(), drawing(), Image.new("RGB", (32, 32))], [RED, BLUE, RED])
    assert right - wrong == pytest.approx(1)
    # vivid as the colour itself and in the centre
    assert right == pytest.approx(2, abs=0.05)
    assert blank == 0


def test_faithful_is_the_share_of_what_the_reward_leaves_out() -> None:
    choice = ScorerChoice(name="faithful", kind="reward", settings={"measure": "faithful"})
    other_colour, other_shape, other_background = BLUE, RED.replace("circle", "square"), RED.replace("black", "white")
    prompts = [RED, other_colour, other_shape, other_background, RED]
    found = open_scorer(choice, "cpu").score([*[drawing()] * 4, Image.new("RGB", (32, 32))], prompts)
    # object, shape and background each count a third, and the colour does not; a blank image has its background
    assert found == pytest.approx([1, 1, 2 / 3, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("image", "prompt", "message"),
    [
        (Image.new("RGB", (64, 64)), RED, "64 x 64 pixels"),
        (drawing(), "a photo of a cat", "'a photo of a cat' is not a prompt of the miniature"),
    ],
)
def test_other_worlds_are_refused(image: Image.Image, prompt: str, message: str) -> None:
    scorer = open_scorer(ScorerChoice(name="reward", kind="reward"), "cpu")
    with pytest.raises(ScorerError, match=message):
        scorer.score([image], [prompt])
    assert np.array_equal(scorer.score([], []), np.array([]))
