"""A server as a scorer: what it is sent, what its failures end in, and what is asked twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_server import Answer, JudgeServer, brightness_of, chat, chat_images
from PIL import Image

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import is_judge, open_scorer

GREYS = (10, 200, 90, 40)
IMAGES = [Image.new("RGB", (6, 4), (grey, grey, grey)) for grey in GREYS]
PROMPTS = ["a {cat}", "a dog", "a bird", 'say "hello"']


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(server: JudgeServer, **settings: Any):
    settings = {"model": "judge", "backoff_seconds": 0.001, "timeout_seconds": 20.0, **settings}
    return open_scorer(ScorerChoice(name="judge", kind="http", source=server.url, settings=settings), "cpu")


def says_brightness(number: int, body: Any) -> Answer:
    return Answer(chat(f"I give it {brightness_of(chat_images(body)[0]):g} points."))


def test_each_image_gets_the_number_in_the_model_s_words() -> None:
    with JudgeServer(says_brightness) as server:
        scorer = opened(server, prompt_template="Is it {prompt}?", parameters={"temperature": 0.5})
        assert not is_judge(scorer)
        assert list(scorer.score(IMAGES, PROMPTS)) == list(GREYS)
    assert {body["messages"][0]["content"][-1]["text"] for body in server.bodies} == {
        f"Is it {prompt}?" for prompt in PROMPTS
    }
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("judge", 0.5)}


def test_answers_are_kept_by_content_and_asked_again_if_anything_changes(own_cache: Path) -> None:
    with JudgeServer(says_brightness) as server:
        opened(server).score(IMAGES, PROMPTS)
        assert len(server.bodies) == 4
        # in another order, with an equal image of another object, by another scorer
        scores = opened(server).score([IMAGES[1].copy(), IMAGES[0]], [PROMPTS[1], PROMPTS[0]])
        assert list(scores) == [200, 10]
        assert len(server.bodies) == 4
        opened(server).score(IMAGES[:1], ["another prompt"])
        opened(server).score([Image.new("RGB", (4, 6), (10, 10, 10))], PROMPTS[:1])
        opened(server, model="other").score(IMAGES[:1], PROMPTS[:1])
        opened(server, cache="none").score(IMAGES[:1], PROMPTS[:1])
        assert len(server.bodies) == 8
        for path in own_cache.rglob("*.json"):
            path.write_bytes(path.read_bytes()[:9])
        assert list(opened(server).score(IMAGES[:1], PROMPTS[:1])) == [10]
        assert len(server.bodies) == 9


@pytest.mark.parametrize(
    "failure",
    [
        Answer({"error": "busy"}, status=500),
        Answer({"error": "slow down"}, status=429, headers={"Retry-After": "0.01"}),
        Answer(chat("1"), hangs=True),
        Answer(chat("7"), delay_seconds=0.01),
    ],
    ids=["500", "429", "hang", "delay"],
)
def test_what_passes_is_tried_again(failure: Answer) -> None:
    with JudgeServer(lambda number, body: failure if number < 2 else Answer(chat("7"))) as server:
        scorer = opened(server, requests_at_once=2, timeout_seconds=0.5 if failure.hangs else 20.0)
        assert list(scorer.score(IMAGES, PROMPTS)) == [7] * 4
    # a busy machine may be slow too, which looks like one more hang
    assert len(server.bodies) >= 6 if failure.hangs else len(server.bodies) == (4 if failure.delay_seconds else 6)


@pytest.mark.parametrize(
    ("answer", "settings", "message"),
    [
        (Answer(chat("1"), hangs=True), {"timeout_seconds": 0.1}, "no answer in 3 tries; the last one: no answer for"),
        (Answer({"error": "no"}, status=503), {}, "no answer in 3 tries; the last one: status 503"),
        (Answer({"error": "who are you"}, status=401), {}, "status 401 .*check api_key_variable"),
        (Answer({"error": "unknown model"}, status=404), {}, "status 404 .*unknown model"),
        (Answer({"error": "bad field"}, status=400), {}, "status 400 .*bad field"),
        (Answer(b"<html>hello</html>"), {}, "is no JSON; check its URL"),
        (Answer({"text": "hello"}), {}, "is no chat completion"),
        (Answer({"points": 3}), {"form": "json"}, "has no 'score'"),
        (Answer({"score": "good"}), {"form": "json"}, "'good'; it must be a number"),
        (Answer(b"[" * 100_000), {"form": "json"}, "is no JSON"),
        (Answer({}, status=302, headers={"Location": "/"}), {}, "status 302"),
    ],
)
def test_what_does_not_pass_ends_in_one_line(answer: Answer, settings: dict[str, Any], message: str) -> None:
    with (
        JudgeServer(lambda number, body: answer) as server,
        pytest.raises(ScorerError, match=message) as caught,
    ):
        opened(server, retries=2, **settings).score(IMAGES, PROMPTS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_server_that_is_gone_ends_in_one_line() -> None:
    with JudgeServer(says_brightness) as server:
        scorer = opened(server, retries=1)
    with pytest.raises(ScorerError, match="no answer in 2 tries; the last one: ConnectionError"):
        scorer.score(IMAGES, PROMPTS)


def test_an_answer_without_a_number_and_a_refused_image_are_nan() -> None:
    def answer(number: int, body: Any) -> Answer:
        grey = brightness_of(chat_images(body)[0])
        if grey == 90:
            return Answer({"error": "not for me"}, status=400)
        return Answer(chat("I cannot say." if grey == 200 else "3"))

    with JudgeServer(answer) as server:
        scores = opened(server, requests_at_once=1).score(IMAGES, PROMPTS)
    assert np.array_equal(scores, [3, np.nan, np.nan, 3], equal_nan=True)


def test_a_judge_of_pairs_is_asked_in_both_orders() -> None:
    def answer(number: int, body: Any) -> Answer:
        first, second = map(brightness_of, chat_images(body))
        # it prefers the brighter image by far; among the others, whichever comes first
        return Answer(chat("1" if first > second - 60 else "2"))

    with JudgeServer(answer) as server:
        judge = opened(server, pairwise=True)
        assert is_judge(judge)
        bright, dark, grey, darker = IMAGES[1], IMAGES[0], IMAGES[2], IMAGES[3]
        preferences = judge.prefer([bright, dark, grey], [dark, bright, darker], ["a", "b", "c"])
        assert list(preferences) == [1, 0, 0.5]
        assert len(server.bodies) == 6
        once = opened(server, pairwise=True, both_orders=False)
        assert list(once.prefer([grey], [darker], ["c"])) == [1]


def test_plain_json_and_words_with_a_meaning() -> None:
    def answer(number: int, body: Any) -> Answer:
        return Answer({"score": brightness_of(body["image"]) / 2} if "image" in body else chat("Verdict: YES"))

    with JudgeServer(answer) as server:
        scores = opened(server, form="json", higher_is_better=False).score(IMAGES, PROMPTS)
        assert list(scores) == [grey / 2 for grey in GREYS]
        words = opened(server, answer_pattern=r"Verdict: (\w+)", answers={"yes": 1.0, "no": 0.0})
        assert list(words.score(IMAGES[:1], PROMPTS[:1])) == [1]
    assert {body["prompt"] for body in server.bodies if "image" in body} == set(PROMPTS)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    with JudgeServer(lambda number, body: Answer({"error": f"bad key {server.keys[-1]}"}, status=401)) as server:
        with pytest.raises(ScorerError, match="environment variable JUDGE_KEY is not set"):
            opened(server, api_key_variable="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "sk-123456")
        scorer = opened(server, api_key_variable="JUDGE_KEY")
        with pytest.raises(ScorerError, match="status 401") as caught:
            scorer.score(IMAGES[:1], PROMPTS[:1])
    assert server.keys == ["Bearer sk-123456"]
    assert "sk-123456" not in str(caught.value)
    assert "sk-123456" not in repr(scorer.record)
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("ftp://host/x", {"model": "m"}, "is no URL"),
        ("judge", {"model": "m"}, "is no URL"),
        ("http://host:x/", {"model": "m"}, "URL cannot be read"),
        ("https://me:pass@host/x", {"model": "m"}, "has a secret"),
        ("https://host/x?api_key=123", {"model": "m"}, "has a secret"),
        ("https://host/x", {}, "scorer judge: model must be given"),
        ("https://host/x", {"model": "m", "prompt_template": "hello"}, "must contain {prompt}"),
        ("https://host/x", {"model": "m", "answer_pattern": "("}, "no regular expression"),
        ("https://host/x", {"model": "m", "answer_pattern": "x"}, "must have a group"),
        ("https://host/x", {"model": "m", "timeout": 3}, "no setting 'timeout'; .*did you mean timeout_seconds"),
        ("https://host/x", {"model": "m", "retries": -1}, "retries = -1"),
    ],
)
def test_settings_of_no_use_are_refused_before_anything_is_sent(
    source: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScorerError, match=message):
        open_scorer(ScorerChoice(name="judge", kind="http", source=source, settings=settings), "cpu")
