import json
import runpy
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import file_of, picture, row
from repository import ROOT

SCRIPT = ROOT / "scripts" / "data_stats.py"
FILES = ["data_stats.json", "sheet.html", "sheet.png"]


def run(folder, rows, *options):
    """Run the program in this process, whose imports are done; returns its exit status."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    command = [SCRIPT, "--config", "miniature", "--dataset", folder / "train.parquet"]
    command += ["--data.cache_dir", folder / "cache", "--out", folder / "out", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, command)))
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


def test_it_prints_and_writes_what_training_would_see(tmp_path, capsys):
    rows = [row(number, label_0=label) for number, label in enumerate([1.0, 0.0, 0.5, 1.0])]
    status = run(tmp_path, rows, "--data.max_rows", "3", "--sample", "1", "--fail_on", "bad", "contradictions")
    assert status == 0
    assert "3 rows, 1 ties left out, 2 pairs of 2 prompts" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    numbers = json.loads((tmp_path / "out" / "data_stats.json").read_text())
    assert (numbers["pairs"], numbers["images"]["images"], numbers["data"]["max_rows"]) == (2, 4, 3)
    assert numbers["images"]["enlarged"] == 4  # 20 x 16 pixels, trained at 32 x 32
    assert (tmp_path / "out" / "sheet.html").read_text().count("<article>") == 1


@pytest.mark.parametrize("what", ["bad", "contradictions"])
def test_it_fails_on_what_it_was_told_to(tmp_path, capsys, what):
    one, other = file_of(picture(0)), file_of(picture(1))
    rows = {
        "bad": [row(0), row(1, jpg_0=b"torn")],
        "contradictions": [row(0, caption="q", jpg_0=one, jpg_1=other, label_0=label) for label in (1.0, 0.0)],
    }
    assert run(tmp_path, rows[what], "--fail_on", what) == 1
    assert f"there are {what}" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_a_wrong_option_is_refused_before_anything_is_written(tmp_path, capsys):
    assert run(tmp_path, [row(0)], "--data.resoluton", "64") == 2
    assert "did you mean data.resolution" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
