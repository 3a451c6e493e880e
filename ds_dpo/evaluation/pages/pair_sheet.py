"""A page of pairs: one HTML file without scripts, which is safe for prompts and images that nobody has checked."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from PIL import Image

from ds_dpo.data.images import decode_rgb
from ds_dpo.data.source import BadRow, PairRecord, RawImage
from ds_dpo.data.statistics.tally import winner_of
from ds_dpo.errors import DataError

Outcome = Literal["won", "lost", "tie", "unread"]
OUTCOMES: dict[int, tuple[Outcome, Outcome]] = {1: ("won", "lost"), 0: ("tie", "tie"), -1: ("lost", "won")}
THUMBNAIL_PIXELS = 384
# JPEG's 8 x 8 blocks would be visible in small images, which are enlarged
SMALL_PIXELS = 128


@dataclass(frozen=True, kw_only=True)
class SheetImage:
    """picture: a thumbnail, None if the image cannot be decoded. problem: why. size: (height, width) of the image."""

    outcome: Outcome
    picture: Image.Image | None
    size: tuple[int, int] | None
    problem: str = ""

    @property
    def caption(self) -> str:
        """The image's size, or that it is bad."""
        if self.size is None:
            return "bad image" if self.problem else ""
        return f"{self.size[0]} x {self.size[1]}"

    @property
    def label(self) -> str:
        """The outcome in words."""
        return LABELS[self.outcome]


@dataclass(frozen=True, kw_only=True)
class SheetPair:
    """images: left and right. prompt: None if the row cannot be read. facts: target and weight in words."""

    uid: str
    prompt: str | None
    facts: str
    images: tuple[SheetImage, SheetImage]

    @property
    def prompt_shown(self) -> str:
        """The prompt, or in brackets why there is none."""
        if self.prompt is None:
            return "(not read)"
        return self.prompt if self.prompt.strip() else "(empty prompt)"


def sheet_pair(pair: PairRecord | BadRow) -> SheetPair:
    """Return a pair with thumbnails; the chosen image is on the right if it is the second one in its row."""
    if isinstance(pair, BadRow):
        unread = SheetImage(outcome="unread", picture=None, size=None, problem="")
        return SheetPair(uid=pair.uid, prompt=None, facts=f"bad row: {pair.reason}", images=(unread, unread))
    chosen, rejected = OUTCOMES[winner_of(pair)]
    images = (_sheet_image(pair.chosen, chosen), _sheet_image(pair.rejected, rejected))
    is_swapped = pair.metadata.get("label") == 0
    facts = f"target {pair.target_probability:.3g}, weight {pair.weight:.3g}"
    return SheetPair(uid=pair.uid, prompt=pair.prompt, facts=facts, images=images[::-1] if is_swapped else images)


def sheet_html(pairs: Sequence[SheetPair], *, title: str, notes: Sequence[str], details: str) -> bytes:
    """Return a page that needs no other file. details: preformatted text, collapsed below the notes."""
    heads = "".join(f"<p>{escape(note)}</p>" for note in notes)
    cards = "\n".join(_card(pair) for pair in pairs)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{heads}
<details><summary>All numbers</summary><pre>{escape(details)}</pre></details>
</header>
<main>
{cards}
</main>
</body>
</html>
"""
    # a prompt may hold halves of surrogate pairs, which cannot be encoded
    return page.encode("utf-8", "replace")


def _card(pair: SheetPair) -> str:
    figures = "".join(_figure(image) for image in pair.images)
    return (
        f'<article><div class="pair">{figures}</div><p class="prompt" dir="auto">{escape(pair.prompt_shown)}</p>'
        f'<p class="facts"><bdi>{escape(pair.uid)}</bdi><br>{escape(pair.facts)}</p></article>'
    )


def _figure(image: SheetImage) -> str:
    if image.picture is None:
        inside = f'<div class="bad">{escape(image.problem)}</div>'
    else:
        small = ' class="small"' if max(image.picture.size) <= SMALL_PIXELS else ""
        inside = f'<img{small} alt="{image.label}" src="{_data_uri(image.picture)}">'
    return (
        f'<figure class="{image.outcome}"><div class="frame">{inside}</div>'
        f"<figcaption><b>{image.label}</b> <span>{image.caption}</span></figcaption></figure>"
    )


def _sheet_image(raw: RawImage | None, outcome: Outcome) -> SheetImage:
    try:
        picture = decode_rgb(raw)
    except DataError as error:
        return SheetImage(outcome=outcome, picture=None, size=None, problem=str(error))
    size = (picture.height, picture.width)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    return SheetImage(outcome=outcome, picture=picture, size=size)


def _data_uri(picture: Image.Image) -> str:
    kind = "PNG" if max(picture.size) <= SMALL_PIXELS else "JPEG"
    buffer = io.BytesIO()
    # no colour profile, because training uses the pixel values without one
    picture.save(buffer, kind, quality=85, optimize=True, icc_profile=None)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


LABELS: dict[Outcome, str] = {"won": "✓ won", "lost": "lost", "tie": "= tie", "unread": ""}
# a word, a tick and a thick full frame mark the winner; colour is not the only sign
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --text: #1c1c1a; --dim: #63635e; --line: #c9c9c2;
  --win: #0b6bcb; --on-win: #fff; --bad: #a3360a; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #222220; --text: #ecece8; --dim: #a3a39c;
  --line: #55554f; --win: #6cb2ff; --on-win: #10202f; --bad: #ff9d73; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 24px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header { max-width: 1000px; margin-bottom: 20px; }
h1 { font-size: 22px; margin: 0 0 8px; overflow-wrap: anywhere; }
header p { margin: 2px 0; color: var(--dim); overflow-wrap: anywhere; }
details { margin-top: 10px; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 12px; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 18px; }
article { min-width: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; align-items: start; }
figure { margin: 0; min-width: 0; }
.frame { aspect-ratio: 1; padding: 3px; border: 1px dashed var(--line); outline: 3px solid transparent;
  display: flex; align-items: center; justify-content: center; overflow: hidden; }
.won .frame { border: 1px solid var(--win); outline-color: var(--win); }
img { width: 100%; height: 100%; object-fit: contain; }
.small { image-rendering: pixelated; }
.bad { color: var(--bad); font-size: 13px; overflow-wrap: anywhere; overflow-y: auto; max-height: 100%; }
figcaption { margin-top: 8px; display: flex; justify-content: space-between; align-items: center; gap: 6px;
  font-size: 13px; color: var(--dim); }
figcaption b { font-weight: 400; padding: 1px 8px; border-radius: 10px; white-space: nowrap; }
.won figcaption b { font-weight: 700; background: var(--win); color: var(--on-win); }
.lost figcaption b, .tie figcaption b { padding-left: 0; }
.prompt { margin: 10px 0 6px; overflow-wrap: anywhere; white-space: pre-wrap; max-height: 9em; overflow-y: auto; }
.facts { margin: 0; font-size: 12px; color: var(--dim); overflow-wrap: anywhere; }
"""
