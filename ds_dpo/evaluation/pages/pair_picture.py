"""Draw pairs as one picture, for places that show no HTML. Its font has only Latin letters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import islice

from PIL import Image, ImageDraw, ImageFont

from ds_dpo.evaluation.pages.pair_sheet import Outcome, SheetImage, SheetPair

NUM_COLUMNS = 3
TILE_PIXELS, FRAME, TILE_GAP = 152, 5, 8
CARD_WIDTH = 2 * (TILE_PIXELS + 2 * FRAME) + TILE_GAP
MARGIN, CARD_GAP = 20, 28
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 20, 14, 12
LINE, SMALL_LINE = TEXT_SIZE + 5, SMALL_SIZE + 4
CAPTION_HEIGHT = SMALL_LINE + 8
MAX_PROMPT_LINES, MAX_UID_LINES = 4, 2
TEXT, DIM, WIN, LINE_COLOUR, EMPTY = "#1c1c1a", "#63635e", "#0b6bcb", "#b9b9b2", "#eeeeea"
BADGES: dict[Outcome, str] = {"won": "won", "lost": "lost", "tie": "tie", "unread": ""}


def sheet_picture(pairs: Sequence[SheetPair], *, title: str, notes: Sequence[str]) -> Image.Image:
    """Lay out pairs in columns; the winner has a thick full frame and a badge, the loser a thin frame."""
    width = 2 * MARGIN + NUM_COLUMNS * CARD_WIDTH + (NUM_COLUMNS - 1) * CARD_GAP
    titles = _wrap(title, _font(TITLE_SIZE), width - 2 * MARGIN, max_lines=2)
    lines = [line for note in notes for line in _wrap(note, _font(TEXT_SIZE), width - 2 * MARGIN, max_lines=4)]
    top = MARGIN + len(titles) * (TITLE_SIZE + 6) + len(lines) * LINE + 18
    remaining = iter(pairs)
    rows = list(iter(lambda: list(islice(remaining, NUM_COLUMNS)), []))
    heights = [max(map(_card_height, row)) for row in rows]
    page = Image.new("RGB", (width, top + sum(heights) + CARD_GAP * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    _draw_lines(draw, titles, (MARGIN, MARGIN), size=TITLE_SIZE, step=TITLE_SIZE + 6, colour=TEXT)
    notes_top = MARGIN + len(titles) * (TITLE_SIZE + 6) + 4
    _draw_lines(draw, lines, (MARGIN, notes_top), size=TEXT_SIZE, step=LINE, colour=DIM)
    for row, height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            _draw_card(page, draw, pair, (MARGIN + column * (CARD_WIDTH + CARD_GAP), top))
        top += height + CARD_GAP
    return page


def _card_height(pair: SheetPair) -> int:
    prompt, facts = _card_lines(pair)
    return TILE_PIXELS + 2 * FRAME + CAPTION_HEIGHT + len(prompt) * LINE + 4 + len(facts) * SMALL_LINE


def _card_lines(pair: SheetPair) -> tuple[list[str], list[str]]:
    prompt = _wrap(pair.prompt_shown, _font(TEXT_SIZE), CARD_WIDTH, max_lines=MAX_PROMPT_LINES)
    uid = _wrap(pair.uid, _font(SMALL_SIZE), CARD_WIDTH, max_lines=MAX_UID_LINES)
    return prompt, [*uid, *_wrap(pair.facts, _font(SMALL_SIZE), CARD_WIDTH, max_lines=2)]


def _draw_card(page: Image.Image, draw: ImageDraw.ImageDraw, pair: SheetPair, corner: tuple[int, int]) -> None:
    left, top = corner
    for place, image in enumerate(pair.images):
        _draw_tile(page, draw, image, (left + place * (TILE_PIXELS + 2 * FRAME + TILE_GAP), top))
    prompt, facts = _card_lines(pair)
    top += TILE_PIXELS + 2 * FRAME + CAPTION_HEIGHT
    _draw_lines(draw, prompt, (left, top), size=TEXT_SIZE, step=LINE, colour=TEXT)
    top += len(prompt) * LINE + 4
    _draw_lines(draw, facts, (left, top), size=SMALL_SIZE, step=SMALL_LINE, colour=DIM)


def _draw_tile(page: Image.Image, draw: ImageDraw.ImageDraw, image: SheetImage, corner: tuple[int, int]) -> None:
    left, top = corner
    side = TILE_PIXELS + 2 * FRAME
    is_winner = image.outcome == "won"
    draw.rectangle(
        (left, top, left + side - 1, top + side - 1),
        fill=EMPTY if image.picture is None else "white",
        outline=WIN if is_winner else LINE_COLOUR,
        width=FRAME - 1 if is_winner else 1,
    )
    if image.picture is None:
        lines = _wrap(image.problem, _font(SMALL_SIZE), TILE_PIXELS - 8, max_lines=TILE_PIXELS // SMALL_LINE - 1)
        _draw_lines(draw, lines, (left + FRAME + 4, top + FRAME + 4), size=SMALL_SIZE, step=SMALL_LINE, colour=TEXT)
    else:
        picture = _fit(image.picture)
        page.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    _draw_caption(draw, image, (left, top + side + 3))


def _draw_caption(draw: ImageDraw.ImageDraw, image: SheetImage, corner: tuple[int, int]) -> None:
    left, top = corner
    font = _font(SMALL_SIZE)
    if image.outcome == "won":
        width = int(font.getlength(BADGES["won"]))
        draw.rounded_rectangle((left, top, left + width + 11, top + SMALL_LINE), radius=8, fill=WIN)
        draw.text((left + 6, top + SMALL_LINE // 2), BADGES["won"], fill="white", font=font, anchor="lm")
    else:
        draw.text((left, top + SMALL_LINE // 2), BADGES[image.outcome], fill=DIM, font=font, anchor="lm")
    right = left + TILE_PIXELS + 2 * FRAME - 1
    draw.text((right, top + SMALL_LINE // 2), image.caption, fill=DIM, font=font, anchor="rm")


def _fit(picture: Image.Image) -> Image.Image:
    """Return a picture whose longer side is a tile's; an enlarged picture keeps its pixels."""
    scale = TILE_PIXELS / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _draw_lines(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], corner: tuple[int, int], *, size: int, step: int, colour: str
) -> None:
    for place, line in enumerate(lines):
        draw.text((corner[0], corner[1] + place * step), line, fill=colour, font=_font(size))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, *, max_lines: int) -> list[str]:
    """Return lines of at most width pixels; a longer word is cut, and text beyond max_lines becomes '...'."""
    lines: list[str] = []
    # a prompt may have a megabyte; text after the last line is not measured
    words = text[: max_lines * width].encode("utf-8", "replace").decode().split()
    line = ""
    while words and len(lines) <= max_lines:
        word = words.pop(0)
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width:
            line = joined
        elif line:
            lines, line = [*lines, line], ""
            words.insert(0, word)
        else:
            fitting = _fitting(word, font, width)
            lines.append(word[:fitting])
            words.insert(0, word[fitting:])
    lines += [line] if line else []
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    return [*lines[: max_lines - 1], last[: _fitting(last, font, width - int(font.getlength(" ...")) - 1)] + " ..."]


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """Return the number of letters that fit, at least 1."""
    return max(1, bisect_right(range(1, len(text) + 1), float(width), key=lambda number: font.getlength(text[:number])))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow must be built with FreeType, as its wheels are"
    return font
