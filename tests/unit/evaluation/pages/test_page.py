"""What of an evaluation's page can be tested without a browser."""

import base64
import dataclasses
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_evaluation import made_results

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.pages.page import FOLDER, PROGRAMS, STYLES, block_of_json, page_html, write_page

NASTY = '</script><script>alert(1)</script><!-- \u2028 & "quoted" <img src=x onerror=alert(2)>'


class Parts(HTMLParser):
    """Collects the tags of a page, and the texts of its scripts and styles, as a browser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._inside = {"script": attributes.get("id") or "program", "style": "style"}.get(tag, "")

    def handle_data(self, text: str) -> None:
        if self._inside:
            self.texts[self._inside] = self.texts.get(self._inside, "") + text

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def test_text_from_outside_is_data_alone(tmp_path: Path) -> None:
    results = made_results(None, prompts=[NASTY, "a cat"], models=(NASTY, "tuned"))
    results = dataclasses.replace(results, evaluation=NASTY, warnings=[NASTY], settings={NASTY: NASTY})
    path = write_page(results, tmp_path)
    assert path == tmp_path / "page.html"
    assert os.listdir(tmp_path) == ["page.html"]
    page = path.read_text(encoding="utf-8")
    parts = Parts(page)
    assert [tag for tag, _ in parts.tags].count("script") == 2
    assert not [tag for tag, _ in parts.tags if tag == "img"]
    assert "<!--" not in page
    data = json.loads(parts.texts["data"])
    assert data["prompts"][0][0] == data["models"][0]["label"] == data["warnings"][0] == data["evaluation"] == NASTY
    assert data["images"][0] == [0, 0, "0", f"images/{NASTY}/00000_0.png", results.images[0].sha256, [20, 30]]


def test_only_the_program_and_style_of_the_page_may_run() -> None:
    parts = Parts(page_html(made_results(None, prompts=["a cat"])))
    (policy,) = [given["content"] for tag, given in parts.tags if given.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    for directive, text in (("script-src", parts.texts["program"]), ("style-src", parts.texts["style"])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_the_page_needs_no_network() -> None:
    page = page_html(made_results(None, prompts=["a cat"]))
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name of XML, which is not loaded


def test_numbers_that_json_has_not_are_null() -> None:
    assert block_of_json({"a": [float("nan"), float("inf"), 1.5, True, None], 2: (Path("x"),)}) == (
        '{"a":[null,null,1.5,true,null],"2":["x"]}'
    )


def test_every_file_of_the_template_is_used() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*STYLES, *PROGRAMS, "page.html.jinja"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/page\.html cannot be written \(No such file or directory\)"):
        write_page(made_results(None, prompts=["a cat"]), tmp_path / "missing")
