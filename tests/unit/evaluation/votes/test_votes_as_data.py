"""A votes file is a data set of pairs for the trainer, in the evaluation's folder or away from it."""

import shutil
from pathlib import Path

import pytest
from made_evaluation import made_results
from made_votes import vote_file, vote_row

from ds_dpo.config.load import load_config
from ds_dpo.data.reading.run_pairs import open_trained_on


@pytest.mark.parametrize("is_away", [False, True])
@pytest.mark.parametrize(("ties", "expected"), [("drop", [1, 0]), ("soft", [1, 0, 0.5])])
def test_votes_are_read_as_pairs(tmp_path: Path, is_away: bool, ties: str, expected: list[float]) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    results = made_results(folder, prompts=["a cat", "a dog", "a car"])
    rows = [vote_row(results, prompt, label) for prompt, label in enumerate([1, 0, 0.5])]
    votes = vote_file(folder / "votes.jsonl", *rows)
    options = ["--config=miniature", "--data.format=manifest", f"--data.cache_dir={tmp_path / 'cache'}"]
    if is_away:
        votes = Path(shutil.move(votes, tmp_path / "votes.jsonl"))
        options.append(f"--data.image_root={folder}")
    source = open_trained_on(
        load_config([*options, f"--data.dataset={votes}", f"--data.ties={ties}"]).config, say=print
    )
    assert len(source) == len(expected)
    for index, label in enumerate(expected):
        record = source.read(index)
        better, worse = ("image_1", "image_0") if label == 0 else ("image_0", "image_1")
        assert record.prompt == rows[index]["prompt"]
        assert record.chosen == (folder / rows[index][better]).read_bytes()
        assert record.rejected == (folder / rows[index][worse]).read_bytes()
        assert record.target_probability == (0.5 if label == 0.5 else 1)
