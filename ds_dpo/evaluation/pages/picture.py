"""Labelled grids of images with a row per prompt, which show what was drawn and how it was scored."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ds_dpo.errors import ConfigError
from ds_dpo.storage.replace import replace_file

Mark = Literal["win", "loss"]
MARK_COLOURS: dict[Mark | None, str] = {"win": "#15803d", "loss": "#c2410c", None: "#444444"}
MIN_TILE_PIXELS, MAX_TILE_PIXELS = 96, 512
MARGIN, TILE_GAP, GROUP_GAP, FRAME = 16, 6, 24, 4
LABEL_WIDTH = 190
MAX_LABEL_LETTERS = 2000  # more than fits beside any tile
TITLE_SIZE, TEXT_SIZE = 20, 14
LINE = TEXT_SIZE + 5


@dataclass(frozen=True)
class Tile:
    """An image (3, X, Y) in 0..1, a short text below it, and a mark that frames it."""

    image: Tensor
    text: str = ""
    mark: Mark | None = None


@dataclass(frozen=True)
class Group:
    """Neighbouring columns under a common heading."""

    heading: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A label, usually the prompt, and one tile per column of all groups."""

    label: str
    tiles: tuple[Tile, ...]


def image_grid(
    rows: Sequence[Row],
    groups: Sequence[Group],
    *,
    title: str,
    notes: Sequence[str] = (),
    tile_pixels: int | None = None,
) -> Image.Image:
    """Lay out tiles under their headings, with the title and the notes above.

    tile_pixels: side of a tile; None is that of the images, within 96 to 512. Smaller images are enlarged without
    smoothing. A pixel that is not finite is black. Raises ValueError unless each row has one tile per column.
    """
    columns = [name for group in groups for name in group.columns]
    for row in rows:
        if len(row.tiles) != len(columns):
            raise ValueError(f"row {row.label!r} has {len(row.tiles)} tiles for {len(columns)} columns")
    largest = max(max(tile.image.shape[1:]) for row in rows for tile in row.tiles)
    side = tile_pixels or min(MAX_TILE_PIXELS, max(MIN_TILE_PIXELS, largest))
    lefts = _column_lefts(groups, side)
    width = max(lefts[-1] + side + MARGIN, 640)
    notes = [line for note in notes for line in _wrap(note, width - 2 * MARGIN)]
    top = MARGIN + TITLE_SIZE + 12 + len(notes) * LINE + 10
    row_height = side + 2 * FRAME + LINE + 10
    first_row = top + (1 + max(len(_wrap(name, side)) for name in columns)) * LINE + 8
    page = Image.new("RGB", (width, first_row + len(rows) * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, fill="black", font=_font(TITLE_SIZE))
    for place, note in enumerate(notes):
        draw.text((MARGIN, MARGIN + TITLE_SIZE + 12 + place * LINE), note, fill="#444444", font=_font(TEXT_SIZE))
    _draw_headings(draw, groups, lefts, top=top, side=side)
    for place, row in enumerate(rows):
        _draw_row(page, row, lefts, top=first_row + place * row_height, side=side)
    return page


def validation_grid(
    images: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    title: str,
    reference: Tensor | None = None,
) -> Image.Image:
    """Return the grid of a ValidationSampler's images (prompts * seeds, 3, X, Y): a row per prompt, a column per seed.

    reference: images of the same prompts and seeds, each shown left of the policy's.
    """
    of_prompts = images.split(len(seeds))
    if reference is None:
        groups = [Group("", tuple(f"seed {seed}" for seed in seeds))]
        rows = [Row(prompt, tuple(map(Tile, own))) for prompt, own in zip(prompts, of_prompts, strict=True)]
        return image_grid(rows, groups, title=title)
    groups = [Group(f"seed {seed}", ("reference", "policy")) for seed in seeds]
    beside = zip(prompts, reference.split(len(seeds)), of_prompts, strict=True)
    rows = [
        Row(prompt, tuple(Tile(image) for both in zip(theirs, own, strict=True) for image in both))
        for prompt, theirs, own in beside
    ]
    return image_grid(rows, groups, title=title)


def save_png(page: Image.Image, path: Path) -> None:
    """Write a picture completely or not at all. Raises ConfigError if it cannot be written."""
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    save_file(path, buffer.getvalue())


def save_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, and make its folder. Raises ConfigError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content, sync=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder") from error


def _column_lefts(groups: Sequence[Group], side: int) -> list[int]:
    lefts, left = [], MARGIN + LABEL_WIDTH
    for group in groups:
        for _ in group.columns:
            lefts.append(left)
            left += side + 2 * FRAME + TILE_GAP
        left += GROUP_GAP
    return lefts


def _draw_headings(
    draw: ImageDraw.ImageDraw, groups: Sequence[Group], lefts: Sequence[int], *, top: int, side: int
) -> None:
    font, first = _font(TEXT_SIZE), 0
    for group in groups:
        last = first + len(group.columns) - 1
        middle = (lefts[first] + lefts[last] + side) // 2
        if group.heading:
            draw.text((middle, top), group.heading, fill="#444444", font=font, anchor="ma")
            rule = top + LINE - 1
            draw.line((lefts[first], rule, lefts[last] + side, rule), fill="#999999")
        for left, name in zip(lefts[first : last + 1], group.columns, strict=True):
            for line, words in enumerate(_wrap(name, side)):
                place = (left + side // 2, top + (1 + line) * LINE + 2)
                draw.text(place, words, fill="black", font=font, anchor="ma", stroke_width=0.3)
        first = last + 1


def _draw_row(page: Image.Image, row: Row, lefts: Sequence[int], *, top: int, side: int) -> None:
    draw, font = ImageDraw.Draw(page), _font(TEXT_SIZE)
    lines = _wrap(row.label, LABEL_WIDTH - 20)
    room = max(1, side // LINE)
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1] + " ..."]
    first = top + FRAME + (side - len(lines) * LINE) // 2
    for place, line in enumerate(lines):
        draw.text((MARGIN, first + place * LINE), line, fill="black", font=font)
    for left, tile in zip(lefts, row.tiles, strict=True):
        if tile.mark is not None:
            frame = (left - FRAME, top, left + side + FRAME - 1, top + side + 2 * FRAME - 1)
            draw.rectangle(frame, fill=MARK_COLOURS[tile.mark])
        page.paste(_enlarge(tile.image, side), (left, top + FRAME))
        below = (left + side // 2, top + side + 2 * FRAME + 2)
        draw.text(below, tile.text, fill=MARK_COLOURS[tile.mark], font=font, anchor="ma")


def to_picture(image: Tensor) -> Image.Image:
    """Return an image (3, X, Y) in 0..1 with 8 bits per channel; a pixel that is not finite is black."""
    pixels = (image.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def _enlarge(image: Tensor, side: int) -> Image.Image:
    """Return an image (3, X, Y) as a square of side pixels; an enlarged image keeps its pixels."""
    picture = to_picture(image)
    resampling = Image.Resampling.NEAREST if max(picture.size) <= side else Image.Resampling.LANCZOS
    return picture if picture.size == (side, side) else picture.resize((side, side), resampling)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _wrap(text: str, width: int) -> list[str]:
    """Return lines of at most width pixels; a wider word is broken."""
    font, lines = _font(TEXT_SIZE), [""]
    for word in text[:MAX_LABEL_LETTERS].split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
