"""scripts/make_pairs.py from prompts to pairs that training reads, with the miniature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_sd3 import save_tiny_sd3

from ds_dpo.commands import make_pairs
from ds_dpo.config.load import load_config
from ds_dpo.data.reading.run_pairs import open_trained_on
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.evaluation.drawing.named_model import ModelChoice
from ds_dpo.feedback.pairs.program import PairRequest, noise_shape

PROMPTS = ["a red circle on a white background", "a blue square on a black background"]
MODEL = "ds_dpo://assets/miniature/model"


def arguments(out: Path, *options: str, seeds: int = 3) -> list[str]:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    drawing = ["--seeds", str(seeds), "--steps", "2", "--guidance", "1", "--scheduler", "ddim", "--device", "cpu"]
    model = ["--model", MODEL, "--prompts", str(prompts), "--scorer", "reward"]
    return [*model, *drawing, "--out", str(out), *options]


@pytest.mark.slow
def test_pairs_of_drawn_images_are_trained_on_and_made_anew_without_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs"
    make_pairs.main(arguments(out, "--pairs", "all"))
    said = capsys.readouterr().out
    assert "drew 6 of 6 images" in said
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    record = json.loads((out / "pairs.json").read_text())
    assert record["pairs"] + record["undecided"] == 6  # three of each prompt
    assert record["noise_shape"] == [4, 8, 8]
    assert {row["caption"] for row in rows} <= set(PROMPTS)
    assert all(np.frombuffer(row["noise_0"], "<f4").size == 4 * 8 * 8 for row in rows)
    scores = {
        image["sha256"]: image["scores"]["reward"] for image in json.loads((out / "results.json").read_text())["images"]
    }
    for row in rows:
        better, worse = ("0", "1") if row["label_0"] == 1 else ("1", "0")
        assert scores[row[f"image_{better}_uid"]] > scores[row[f"image_{worse}_uid"]]
    config = load_config(
        ["--config", "miniature", "--dataset", str(out / "pairs.parquet"), "--data.cache_dir", str(tmp_path / "cache")]
    ).config
    assert len(open_trained_on(config, say=lambda line: None)) == len(rows)

    if record["pairs"]:
        make_pairs.main(arguments(out, "--pairs", "best_worst"))
        said = capsys.readouterr().out
        assert "all 6 images are drawn" in said
        assert pq.read_table(out / "pairs.parquet").num_rows <= 2
    with pytest.raises(DataError, match="no pair is left of 6 images"):
        make_pairs.main(arguments(out, "--least_margin", "1e9"))


def test_what_cannot_give_pairs_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--pairs best_worst: --seeds 1 draws one image of each prompt"):
        make_pairs.main(arguments(tmp_path / "out", seeds=1))
    with pytest.raises(ConfigError, match="--pairs against: needs two models"):
        make_pairs.main(arguments(tmp_path / "out", "--pairs", "against"))
    with pytest.raises(ConfigError, match="--model is missing"):
        make_pairs.main(["--out", str(tmp_path / "out"), "--prompts", "miniature", "--scorer", "reward"])
    assert not (tmp_path / "out").exists()


def test_the_noise_of_a_flow_model_has_its_own_channels(tmp_path: Path) -> None:
    folder = save_tiny_sd3(tmp_path / "sd3")
    request = PairRequest(
        out=tmp_path,
        rule="all",
        least_margin=0,
        models=[ModelChoice(str(folder))],
        vae=None,
        variant=None,
        against=None,
    )
    assert noise_shape(request, resolution=32) == (16, 8, 8)
