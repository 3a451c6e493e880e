"""A program as a scorer: it keeps running over batches, and whatever it does ends in scores or in one line."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import is_judge, open_scorer

GREYS = (10, 200, 90, 40, 70)
IMAGES = [Image.new("RGB", (6, 4), (grey, grey, grey)) for grey in GREYS]
PROMPTS = ["a cat", "a dog", 'say "hello"\n', "ein Bär", "a bird"]

START = "import json, os, sys, time\nfrom PIL import Image\n"
# notes its own process and what it is asked, and answers with the brightness
HONEST = """
print(os.getpid(), os.environ["DS_DPO_SCORER_DEVICE"], file=open(sys.argv[1], "a"))
for line in sys.stdin:
    asked = json.loads(line)
    print(asked["prompt"], asked["left"], file=sys.stderr)
    print(json.dumps({"score": Image.open(asked["image"]).getpixel((0, 0))[0]}), flush=True)
"""
# reads a whole batch before it answers
IN_BATCHES = """
while True:
    batch = []
    while not batch or batch[-1]["left"]:
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        batch.append(json.loads(line))
    for asked in batch:
        print(len(batch), flush=True)
"""
PAIRS = """
for line in sys.stdin:
    asked = json.loads(line)
    one, other = (Image.open(asked[role]).getpixel((0, 0))[0] for role in ("image", "rival"))
    print(json.dumps({"preference": one / (one + other)}), flush=True)
"""


def opened(tmp_path: Path, program: str, *arguments: str, **settings: Any):
    file = tmp_path / "judge.py"
    file.write_text(START + program)
    command = " ".join([sys.executable, str(file), *arguments])
    return open_scorer(ScorerChoice(name="judge", kind="command", source=command, settings=settings), "cuda:1")


def test_one_program_answers_all_batches(tmp_path: Path) -> None:
    scorer = opened(tmp_path, HONEST, str(tmp_path / "notes"), images_at_once=2)
    assert not is_judge(scorer)
    assert list(scorer.score(IMAGES, PROMPTS)) == list(GREYS)
    assert list(scorer.score(IMAGES[:1], PROMPTS[:1])) == [GREYS[0]]
    (note,) = (tmp_path / "notes").read_text().splitlines()
    process, device = note.split()
    assert device == "cuda:1"
    assert "judge.py" in scorer.record["sha256"]
    del scorer
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_a_program_may_read_a_batch_before_it_answers(tmp_path: Path) -> None:
    assert list(opened(tmp_path, IN_BATCHES, images_at_once=3).score(IMAGES, PROMPTS)) == [3, 3, 3, 2, 2]


def test_pairs_are_asked_once_or_in_both_orders(tmp_path: Path) -> None:
    judge = opened(tmp_path, PAIRS, pairwise=True)
    assert is_judge(judge)
    np.testing.assert_allclose(judge.prefer(IMAGES[:2], IMAGES[1:3], PROMPTS[:2]), [10 / 210, 200 / 290])
    both = opened(tmp_path, PAIRS.replace("one / (one + other)", "1"), pairwise=True, both_orders=True)
    np.testing.assert_allclose(both.prefer(IMAGES[:2], IMAGES[1:3], PROMPTS[:2]), [0.5, 0.5])


def test_null_and_numbers_that_are_not_finite_are_nan(tmp_path: Path) -> None:
    answers = "\n".join(["null", '{"score": null}', "NaN", "1e999", "2.5"])
    scorer = opened(tmp_path, f"sys.stdin.readline(); print({answers!r}, flush=True); sys.stdin.read()")
    scores = scorer.score(IMAGES, PROMPTS)
    assert np.array_equal(scores, [np.nan, np.nan, np.nan, np.nan, 2.5], equal_nan=True)


READS = "sys.stdin.readline(); print('loading\\nout of memory', file=sys.stderr, flush=True);"


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (f"{READS} sys.exit(3)", {}, "ended with status 3, after 0 of 5 answers .*loading out of memory"),
        (f"{READS} os.kill(os.getpid(), 9)", {}, "was ended by signal 9, after 0 of 5 .*out of memory"),
        (f"{READS} print(1); print(2)", {}, "ended with status 0, after 2 of 5 answers"),
        (f"{READS} print(1, flush=True); time.sleep(600)", {"timeout_seconds": 0.5}, "gave no answer for 0.5 s, after"),
        (f"{READS} print('score: 3', flush=True); sys.stdin.read()", {}, "answered 'score: 3.*no JSON"),
        (f"{READS} print('x' * 3000000, flush=True); sys.stdin.read()", {}, "a line of more than 1048576 bytes"),
        (f"{READS} print('[' * 90000, flush=True); sys.stdin.read()", {}, "which is no JSON"),
        (f"""{READS} print('{{"points": 3}}', flush=True); sys.stdin.read()""", {}, "has no 'score'"),
        (f"{READS} print('true', flush=True); sys.stdin.read()", {}, "True; it must be a number"),
        ("sys.stdin.close(); os.close(0); time.sleep(600)", {"timeout_seconds": 0.5}, "gave no answer for 0.5 s"),
    ],
)
def test_whatever_a_program_does_ends_in_one_line(
    program: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    scorer = opened(tmp_path, program, **settings)
    with pytest.raises(ScorerError, match=message) as caught:
        scorer.score(IMAGES, PROMPTS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_preference_outside_its_range_is_refused(tmp_path: Path) -> None:
    judge = opened(tmp_path, PAIRS.replace("one / (one + other)", "7"), pairwise=True)
    with pytest.raises(ScorerError, match="a preference is 7; it must be between 0"):
        judge.prefer(IMAGES[:1], IMAGES[1:2], PROMPTS[:1])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nowhere/judge", "'/nowhere/judge' cannot be started"),
        ("judge 'x", "cannot be read"),
        ("''", "cannot be started"),
    ],
)
def test_a_program_that_cannot_be_started_is_named(command: str, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        open_scorer(ScorerChoice(name="judge", kind="command", source=command), "cpu")
