"""docs/scorers.md: its table is the code's, and its programs, settings and classes work as they are printed."""

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, JudgeServer, brightness_of, chat, chat_images
from PIL import Image
from repository import ROOT

from ds_dpo.errors import ConfigError, ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice, read_choices
from ds_dpo.evaluation.scorers.opening import is_judge, open_scorer
from ds_dpo.evaluation.scorers.table import SCORERS

PAGE = (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
IMAGES = [Image.new("RGB", (8, 8), (grey, grey, grey)) for grey in (10, 200, 90)]
PROMPTS = ["a cat", "a dog", "a bird"]
CLASS_IMPORTS = """
from collections.abc import Sequence
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.settings import Settings, settings_of
from ds_dpo.evaluation.scorers.weights import record_of
"""
# of the packages that the page's programs import, with scores that can be told apart
IMAGE_REWARD = """
print("a line that a library prints")
class Model:
    def score(self, prompt, images):
        assert len(images) == 1
        return len(prompt) + 0.5
def load(name, device):
    assert (name, device) == ("ImageReward-v1.0", "cpu")
    return Model()
"""
HPSV3 = """
class HPSv3RewardInferencer:
    def __init__(self, device):
        assert device == "cpu"
    def reward(self, *, image_paths, prompts):
        print("a line that a library prints")
        return [(10 * len(image_paths) + len(prompt), 0.1) for prompt in prompts]
"""


def block_with(text: str) -> str:
    """Return the page's one code block that has a text, without its indent."""
    found = [block for block in BLOCK.findall(PAGE) if text in block]
    assert len(found) == 1, text
    return re.sub(r"^ {4}", "", found[0], flags=re.MULTILINE)


def settings_file(folder: Path, text: str, source: str | None = None) -> ScorerChoice:
    block = block_with(text)
    if source is not None:
        block = re.sub(r"^source: .*$", f"source: {source}", block, flags=re.MULTILINE)
    path = folder / "settings.yaml"
    path.write_text(block)
    (choice,) = read_choices([str(path)])
    return choice


def test_the_table_is_the_code_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (higher|lower|as set) \|([^|]*)\|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)
    directions = {True: "higher", False: "lower", None: "as set"}
    assert {name: direction for name, direction, _, _ in rows} == {
        name: directions[row.higher_is_better] for name, row in SCORERS.items()
    }
    for name, _, weights, needs in rows:
        assert SCORERS[name].source is None or f"`{SCORERS[name].source}`" in weights
        assert needs.strip(" `") == (SCORERS[name].install or "")


@pytest.mark.parametrize(
    ("program", "package", "code", "scores"),
    [
        ("import ImageReward", "ImageReward", IMAGE_REWARD, [5.5, 5.5, 6.5]),
        # in batches of 2: 2 and 1 images
        ("import HPSv3RewardInferencer", "hpsv3", HPSV3, [25, 25, 16]),
    ],
)
def test_its_programs_answer(
    program: str, package: str, code: str, scores: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{package}.py").write_text(code)
    (tmp_path / "judge.py").write_text(block_with(program))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    choice = settings_file(tmp_path, "scorer: command", source=f"{sys.executable} {tmp_path / 'judge.py'}")
    small = ScorerChoice(
        name=choice.name, kind=choice.kind, source=choice.source, settings={**choice.settings, "images_at_once": 2}
    )
    assert list(open_scorer(small, "cpu").score(IMAGES, PROMPTS)) == scores


def test_its_servers_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_API_KEY", "sk-1")

    def answer(number: int, body: Any) -> Answer:
        if "messages" not in body:
            return Answer({"score": brightness_of(body["image"])})
        seen = [brightness_of(part) for part in chat_images(body)]
        if len(seen) == 2:
            return Answer(chat("1" if seen[0] > seen[1] else "2"))
        return Answer(chat(f"It has 3 objects.\nFinal score: {seen[0] / 100:g}"))

    with JudgeServer(answer) as server:
        rating = open_scorer(settings_file(tmp_path, "name: vlm\n", server.url), "cpu")
        assert list(rating.score(IMAGES, PROMPTS)) == [0.1, 2, 0.9]
        judge = open_scorer(settings_file(tmp_path, "name: vlm_pairs", server.url), "cpu")
        assert is_judge(judge)
        assert list(judge.prefer(IMAGES[:2], IMAGES[1:], PROMPTS[:2])) == [0, 1]
        plain = open_scorer(settings_file(tmp_path, "form: json", server.url), "cpu")
        assert list(plain.score(IMAGES, PROMPTS)) == [10, 200, 90]
    assert "Bearer sk-1" in server.keys


def install_plugin(folder: Path, code: str, points: str) -> None:
    (folder / "my_scorers.py").write_text(code)
    info = folder / "my_scorers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-scorers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def plugin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_scorers", raising=False)
    yield tmp_path
    sys.modules.pop("my_scorers", None)


def test_its_class_is_a_scorer_and_its_plugin_is_found(plugin_folder: Path) -> None:
    points = block_with("project.entry-points").replace('project.entry-points."ds_dpo.scorers"', "ds_dpo.scorers")
    install_plugin(plugin_folder, CLASS_IMPORTS + block_with("class Brightness"), points.replace('"', ""))
    (choice,) = read_choices(["brightness"])
    assert list(open_scorer(choice, "cpu").score(IMAGES, PROMPTS)) == [10, 200, 90]
    with pytest.raises(ConfigError, match="did you mean brightness"):
        read_choices(["brightnes"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import a_package_that_is_missing\n", "plugin my_scorers:Mine of my-scorers cannot be loaded .*No module"),
        ("", "plugin my_scorers:Mine of my-scorers cannot be loaded .*Mine"),
        ("def Mine(choice, device):\n    return 1 / 0\n", "cannot be loaded .*ZeroDivisionError"),
        ("def Mine(choice, device):\n    return object()\n", "makes no scorer: it lacks name, images_at_once, record"),
    ],
)
def test_a_plugin_of_no_use_is_named(code: str, message: str, plugin_folder: Path) -> None:
    install_plugin(plugin_folder, code, "[ds_dpo.scorers]\nmine = my_scorers:Mine\nclip = my_scorers:Mine\n")
    assert {"mine", "clip"} <= {point.name for point in entry_points(group="ds_dpo.scorers")}
    (choice,) = read_choices(["mine"])
    with pytest.raises(ScorerError, match=message) as caught:
        open_scorer(choice, "cpu")
    assert "\n" not in str(caught.value)
    # the table's own scorer stays
    assert read_choices(["clip"])[0].source == SCORERS["clip"].source
