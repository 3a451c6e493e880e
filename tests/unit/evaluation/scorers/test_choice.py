"""The words after --scorer: read without torch, refused in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from ds_dpo.errors import ConfigError, ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice, read_choices
from ds_dpo.evaluation.scorers.opening import open_scorer
from ds_dpo.evaluation.scorers.table import SCORERS


def test_words_give_names_sources_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text("scorer: clip\nname: clip_b32\nsource: openai/clip-vit-base-patch32\nimages_at_once: 8\n")
    assert read_choices(["pickscore", "clip=/models/clip", str(file)]) == (
        ScorerChoice(name="pickscore", kind="pickscore", source="yuvalkirstain/PickScore_v1"),
        ScorerChoice(name="clip", kind="clip", source="/models/clip"),
        ScorerChoice(
            name="clip_b32", kind="clip", source="openai/clip-vit-base-patch32", settings={"images_at_once": 8}
        ),
    )


def test_a_command_may_end_in_a_yaml_file_and_a_folder_may_have_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "a=b" / "judge.yaml"
    file.parent.mkdir()
    file.write_text("scorer: reward\nname: truth\n")
    assert read_choices(["command=python judge.py --config x.yaml", str(file)]) == (
        ScorerChoice(name="command", kind="command", source="python judge.py --config x.yaml"),
        ScorerChoice(name="truth", kind="reward"),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pickscor"], "no scorer of this name; .*brisque.*did you mean pickscore"),
        (["clip", "clip=/models/other"], "two scorers have the name clip"),
        (["clip="], "incomplete"),
        ([""], "incomplete"),
        (["reward=/models/reward"], "takes no source"),
        (["missing.yaml"], "missing.yaml cannot be read"),
        (["http"], "needs a source, which is a URL; give http=SOURCE, or a settings file"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_choices(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "scorer = None"),
        ("scorer: [clip]\n", "scorer = "),
        ("scorer: clip\nname: a/b\n", "letters, digits"),
        ("scorer: clip\nsource: 3\n", "source = 3"),
        ("scorer: clip\n1: 3\n", "is not text"),
        ("scorer: klip\n", "did you mean clip"),
        ("- clip\n", "must contain names and values"),
    ],
)
def test_a_settings_file_of_no_use_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_choices([str(file)])


def test_an_unknown_setting_is_refused_with_those_that_fit() -> None:
    with pytest.raises(
        ScorerError, match="no setting 'images_at_one'; images_at_once, measure would fit; did you mean"
    ):
        open_scorer(ScorerChoice(name="reward", kind="reward", settings={"images_at_one": 3}), "cpu")
    with pytest.raises(ScorerError, match="images_at_once = 0"):
        open_scorer(ScorerChoice(name="reward", kind="reward", settings={"images_at_once": 0}), "cpu")


def test_every_row_has_its_words_and_a_class_and_a_listing_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from ds_dpo.evaluation.scorers.choice import read_choices\n"
        "from ds_dpo.evaluation.scorers.table import SCORERS\n"
        "read_choices(['pickscore', 'reward'])\n"
        "assert not {'torch', 'transformers', 'cv2', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    for name, row in SCORERS.items():
        assert row.words.endswith("."), name
        module, _, _ = row.made_by.partition(":")
        assert module.startswith("ds_dpo.evaluation.scorers."), name
        assert not row.needs_source or row.takes, name
