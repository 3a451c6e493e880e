import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ds_dpo.data.source import BadRow, PairRecord
from ds_dpo.evaluation.pages.pair_picture import CARD_WIDTH, MARGIN, TILE_PIXELS, WIN, sheet_picture
from ds_dpo.evaluation.pages.pair_sheet import sheet_html, sheet_pair

RED, BLUE = (200, 30, 30), (30, 30, 200)
VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert('x')</script> \"quoted\" & <img src=x onerror=y> 'single'"


def image(colour, *, width=40, height=30):
    return Image.new("RGB", (width, height), colour)


def pair(*, prompt="a prompt", chosen=RED, rejected=BLUE, target=1.0, **fields):
    return PairRecord(
        prompt=prompt,
        chosen=image(chosen),
        rejected=image(rejected),
        pair_id=1,
        uid="row 1",
        target_probability=target,
        **fields,
    )


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and for each pair its text and (outcome, image) by side."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open_tags, self.tags, self.attributes, self.pairs = [], [], [], []
        self.feed(content.decode("utf-8"))
        assert self.open_tags == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        found = dict(attributes)
        if tag == "article":
            self.pairs.append({"text": "", "sides": []})
        if tag == "figure":
            self.pairs[-1]["sides"].append([found["class"], None, ""])
        if tag == "img":
            self.pairs[-1]["sides"][-1][1] = found["src"]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "figure" in self.open_tags:
            self.pairs[-1]["sides"][-1][2] += data
        elif "article" in self.open_tags:
            self.pairs[-1]["text"] += data


def page_of(*pairs, **texts):
    given = {"title": "title", "notes": ["note"], "details": "details"} | texts
    return Page(sheet_html([sheet_pair(each) for each in pairs], **given))


def colour_of(source):
    head, _, data = source.partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((5, 5))


@pytest.mark.parametrize(
    ("target", "label", "expected"),
    [
        (1.0, None, [("won", RED), ("lost", BLUE)]),
        (1.0, 1, [("won", RED), ("lost", BLUE)]),
        (1.0, 0, [("lost", BLUE), ("won", RED)]),
        (1.0, False, [("lost", BLUE), ("won", RED)]),
        (0.5, 0.5, [("tie", RED), ("tie", BLUE)]),
        (0.2, None, [("lost", RED), ("won", BLUE)]),
    ],
)
def test_the_winner_is_marked_on_the_side_where_its_image_stands(target, label, expected):
    metadata = {} if label is None else {"label": label}
    sides = page_of(pair(target=target, metadata=metadata)).pairs[0]["sides"]
    assert [(outcome, colour_of(source)) for outcome, source, _ in sides] == expected
    for outcome, _, text in sides:
        assert outcome in text, "a word says it too, for who cannot tell the frames"
        assert "30 x 40" in text


def test_whatever_a_dataset_says_is_shown_and_not_obeyed():
    record = pair(prompt=HOSTILE)
    bad = BadRow(uid=HOSTILE, reason=HOSTILE)
    torn = PairRecord(prompt="p", chosen={"path": f"/nowhere/{HOSTILE}"}, rejected=None, pair_id=1, uid=HOSTILE)
    page = page_of(record, bad, torn, title=HOSTILE, notes=[HOSTILE], details=HOSTILE)
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.pairs[0]["text"]
    assert page.pairs[1]["text"].count(HOSTILE) == 2
    assert HOSTILE in page.pairs[2]["text"]
    assert HOSTILE in page.pairs[2]["sides"][0][2]


def test_the_page_needs_no_other_file():
    page = page_of(pair())
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "background")]
    assert all(source.startswith("data:image/") for source in sources)
    assert "link" not in page.tags
    content = sheet_html([sheet_pair(pair())], title="t", notes=[], details="")
    assert b"url(" not in content
    assert b"@import" not in content
    assert b"default-src 'none'" in content


def test_a_prompt_that_is_no_text_or_not_there_is_still_a_page():
    page = page_of(pair(prompt="half \ud83d pair"), pair(prompt=" "), BadRow(uid="row 9", reason="no caption"))
    assert "half ? pair" in page.pairs[0]["text"]
    assert "(empty prompt)" in page.pairs[1]["text"]
    assert "row 9" in page.pairs[2]["text"]
    assert "no caption" in page.pairs[2]["text"]
    assert [side[0] for side in page.pairs[2]["sides"]] == ["unread", "unread"]


def test_large_images_become_small_ones():
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1000, 3), dtype=np.uint8)
    record = PairRecord(prompt="p", chosen=Image.fromarray(noise), rejected=image(BLUE), pair_id=1, uid="u")
    content = sheet_html([sheet_pair(record)], title="t", notes=[], details="")
    assert len(content) < 250_000
    assert b"1500 x 1000" in content


def test_the_picture_frames_the_winner():
    page = sheet_picture([sheet_pair(pair()), sheet_pair(pair(metadata={"label": 0}))], title="title", notes=["a note"])
    pixels = np.asarray(page)
    blue = np.array([int(WIN[start : start + 2], 16) for start in (1, 3, 5)])
    columns = np.flatnonzero((pixels == blue).all(axis=2).sum(axis=0) > TILE_PIXELS)  # sides of a full frame
    first, second = columns[columns < MARGIN + CARD_WIDTH], columns[columns >= MARGIN + CARD_WIDTH]
    assert first.min() == MARGIN
    assert first.max() < MARGIN + CARD_WIDTH / 2
    assert second.max() > second.min() > CARD_WIDTH + MARGIN + CARD_WIDTH / 2


def test_the_picture_holds_any_text():
    odd = [
        pair(prompt="x" * 100_000),
        pair(prompt="word " * 1000),
        pair(prompt=""),
        pair(prompt="\ud83d 猫\x00"),
        BadRow(uid="u" * 500, reason="r" * 5000),
        PairRecord(prompt="p", chosen=b"torn", rejected=image(RED, width=1, height=300), pair_id=1, uid="u"),
    ]
    page = sheet_picture([sheet_pair(each) for each in odd], title="t" * 500, notes=["n" * 2000])
    pixels = np.asarray(page)
    assert (pixels[:, -MARGIN:] == 255).all(), "nothing runs over the edge"
    assert (pixels[-5:] == 255).all()
    assert page.height < 1200


def test_a_sheet_may_have_no_pairs():
    assert page_of().pairs == []
    assert sheet_picture([], title="t", notes=[]).height > 0
