"""`scripts/evaluate.py --out DIR --votes FILE`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from made_evaluation import made_results
from made_votes import vote_file, vote_row

from ds_dpo.commands import evaluate
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.evaluation.results_file import save_results


def test_votes_are_counted_without_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = made_results(None, prompts=["a cat", "a dog", "a car", "a boat"])
    save_results(results, tmp_path)
    rows = [vote_row(results, prompt, [1, 1, 0.5, 0][prompt]) for prompt in range(4)]
    files = [vote_file(tmp_path / "a.jsonl", *rows[:3], "{"), vote_file(tmp_path / "b.jsonl", rows[3])]
    evaluate.main(["--out", str(tmp_path), "--votes", *map(str, files)])
    printed = capsys.readouterr().out
    assert "tuned  base     made" in printed
    assert "62.5%" in printed
    assert "1 rows do not count:" in printed
    assert f"{files[0]}, line 4 is not JSON" in printed
    kept = json.loads((tmp_path / "votes.json").read_text())
    assert (kept["comparisons"][0]["scorer"], kept["comparisons"][0]["win_rate"]) == ("human", 0.625)
    assert '"scorer":"human"' in (tmp_path / "page.html").read_text()


def test_one_vote_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = made_results(None, prompts=["a cat"])
    save_results(results, tmp_path)
    evaluate.main(["--out", str(tmp_path), "--votes", str(vote_file(tmp_path / "a.jsonl", vote_row(results, 0, 1)))])
    assert "no win rate: an interval needs votes on two prompts or more" in capsys.readouterr().out


def test_a_folder_without_an_evaluation_and_votes_beside_half_a_request_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json does not exist; a folder that scripts/evaluate\.py wrote"):
        evaluate.main(["--out", str(tmp_path), "--votes", "a.jsonl"])
    with pytest.raises(ConfigError, match="--model is missing"):
        evaluate.main(["--out", str(tmp_path), "--votes", "a.jsonl", "--prompts", "parti"])
