import pytest
import torch
from PIL import Image

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.pages.picture import MARK_COLOURS, Group, Row, Tile, image_grid, save_png, validation_grid

RED = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 32, 32)


def count(page: Image.Image, colour: tuple[int, int, int]) -> int:
    return dict((found, number) for number, found in page.getcolors(maxcolors=1 << 24)).get(colour, 0)


def test_small_images_are_enlarged_without_smoothing() -> None:
    image = RED.clone()
    image[:, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    page = image_grid([Row("a prompt", (Tile(image),))], [Group("", ("seed 0",))], title="title", tile_pixels=96)
    assert count(page, (255, 0, 0)) == 96 * 96 - 9
    assert count(page, (0, 0, 255)) == 9


def test_large_images_are_reduced() -> None:
    page = validation_grid(torch.ones(1, 3, 2048, 2048) * 0.5, ["a"], [0], title="title")
    assert page.width < 1024
    assert count(page, (128, 128, 128)) >= 512 * 512


def test_marks_frame_a_tile() -> None:
    groups = [Group("noise 1", ("base", "tuned"))]
    for mark in ("win", "loss"):
        page = image_grid([Row("a", (Tile(RED, "1.00"), Tile(RED, "1.50", mark)))], groups, title="title")
        assert count(page, tuple(bytes.fromhex(MARK_COLOURS[mark][1:]))) >= 4 * 4 * 96
    page = image_grid([Row("a", (Tile(RED), Tile(RED)))], groups, title="title")
    assert all(count(page, tuple(bytes.fromhex(MARK_COLOURS[mark][1:]))) == 0 for mark in ("win", "loss"))


def test_a_diverged_model_gives_black_pixels_not_a_crash() -> None:
    page = validation_grid(torch.full((1, 3, 32, 32), float("nan")), ["a"], [0], title="title")
    assert count(page, (0, 0, 0)) >= 96 * 96


def test_prompts_of_any_length_fit() -> None:
    short = validation_grid(RED[None], ["a"], [0], title="title")
    for prompt in ("word " * 500, "x" * 3000, "", "a\n\nb", "赤い丸"):
        assert validation_grid(RED[None], [prompt], [0], title="title").size == short.size


def test_rows_and_columns_must_agree() -> None:
    with pytest.raises(ValueError, match="'a' has 1 tiles for 2 columns"):
        image_grid([Row("a", (Tile(RED),))], [Group("", ("one", "two"))], title="title")
    with pytest.raises(ValueError, match="argument"):
        validation_grid(RED.expand(3, 3, 32, 32), ["a"], [0, 1], title="title")


def test_a_picture_is_written_whole(tmp_path) -> None:
    page = validation_grid(RED[None], ["a"], [0], title="title")
    path = tmp_path / "new" / "step.png"
    save_png(page, path)
    save_png(page, path)
    assert Image.open(path).size == page.size
    assert [found.name for found in path.parent.iterdir()] == ["step.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_png(page, tmp_path / "file" / "step.png")
