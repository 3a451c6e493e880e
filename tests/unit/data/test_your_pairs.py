"""docs/your_pairs.md says what works: its examples are made and run as they are on the page."""

import runpy
import sys
from contextlib import suppress

import pytest
from own_pairs_page import PAGE, blocks, examples, make_example
from repository import ROOT

from ds_dpo.config.load import load_config
from ds_dpo.data.images import decode_rgb
from ds_dpo.data.reading.run_pairs import open_held_out_pairs, open_trained_on

# pairs of 40 copies of the page's rows that are trained on and held out together
NUM_PAIRS = {
    "A folder of PNGs and a CSV": 80,
    "A JSON-lines file with rankings": 120,  # two of three images, as the other two are a tie, and one of two
    "Parquet from pandas": 40,  # the other row is a tie
}


@pytest.fixture(params=NUM_PAIRS)
def example(request, tmp_path):
    return request.param, make_example(request.param, tmp_path)


def run(program, *arguments):
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        patch.setattr(sys, "argv", [str(ROOT / program), *map(str, arguments)])
        runpy.run_path(str(ROOT / program), run_name="__main__")


def test_all_examples_are_tested_and_the_readme_has_the_first(tmp_path):
    assert list(examples(tmp_path)) == list(NUM_PAIRS)
    first = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    settings = blocks(first)[-1].splitlines()
    readme = next(block for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")) if "pets.yaml" in block)
    assert readme.splitlines()[1:] == settings[1:]


def test_pairs_are_built_and_no_prompt_is_on_both_sides(example, tmp_path):
    name, path = example
    config = load_config(["--config", str(path), "--data.cache_dir", str(tmp_path / "cache")]).config
    prompts = []
    for source in (open_trained_on(config, say=print), open_held_out_pairs(config, say=print)):
        records = [source.read(index) for index in range(len(source))]
        prompts.append([record.prompt for record in records])
        assert all(
            decode_rgb(image).size == (40, 36) for record in records for image in (record.chosen, record.rejected)
        )
        assert all(record.chosen != record.rejected for record in records)
    trained_on, held_out = prompts
    assert len(trained_on) + len(held_out) == NUM_PAIRS[name]
    assert 2 <= len(held_out) < 0.25 * NUM_PAIRS[name]
    assert set(trained_on).isdisjoint(held_out)


def test_programs_take_the_file(example, tmp_path, capsys):
    name, path = example
    run("ds_dpo/train.py", "--config", path, "--dry_run", "--world_size", "8")
    shown = capsys.readouterr().out
    assert "so these no longer hold: data.expected_pairs 851293" in shown
    run("scripts/data_stats.py", "--config", path, "--data.cache_dir", tmp_path / "cache", "--out", tmp_path / "stats")
    shown = capsys.readouterr().out
    assert "pairs of" in shown
    assert (" held out, " in shown) == (name != "Parquet from pandas")
    assert (tmp_path / "stats" / "sheet.png").exists()


def test_a_dry_run_refuses_a_split_that_a_local_folder_lacks(tmp_path, capsys):
    path = make_example("Parquet from pandas", tmp_path)
    path.write_text(path.read_text().replace("split: test", "split: validation"))
    run("ds_dpo/train.py", "--config", path, "--dry_run", "--world_size", "8")
    assert (
        f"held_out.split validation: data.dataset {tmp_path}/logos has no split validation; it has test, train; "
        "held_out.share would hold out pairs of data.split"
    ) in capsys.readouterr().err
