import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file, save_file

from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.evaluation.drawing.model_folder import find_model, load_pipeline
from ds_dpo.evaluation.miniature.compare import Request, evaluate, images_to_draw
from ds_dpo.miniature.world import TEST_PROMPTS

PROGRAM = ROOT / "scripts" / "evaluate.py"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def tuned(model_folder: Path, tmp_path: Path) -> Path:
    """An export of a UNet alone, of step 7, whose weights differ from the base's."""
    unet = UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.5)
    folder = tmp_path / "tuned"
    unet.save_pretrained(folder / "unet")
    (folder / "export.json").write_text('{"step": 7, "files": []}')
    return folder


def request(model_folder: Path, tuned: Path, out: Path, **changes) -> Request:
    small = {"seeds": 2, "steps": 2, "prompts": TEST_PROMPTS[:3]}
    return Request(base=str(model_folder), tuned=str(tuned), out=out, **{**small, **changes})


@pytest.mark.slow
def test_the_program_writes_a_summary_and_a_picture(model_folder: Path, tuned: Path, tmp_path: Path) -> None:
    models = ["--base", str(model_folder), "--tuned", str(tuned), "--sft", str(model_folder)]
    few = ["--out", str(tmp_path / "out"), "--seeds", "2", "--steps", "2"]
    command = [sys.executable, str(PROGRAM), *models, *few]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    for words in ("48 images per model", "step 7", "wins against base", "colour right", "grid.png", "summary.json"):
        assert words in found.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid.png", "summary.json"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n"] == 48
    assert summary["models"]["tuned"]["step"] == 7
    assert summary["models"]["base"]["step"] is None
    assert summary["comparisons"]["sft_against_base"]["win_rate"] == 0.5
    assert summary["reward_sft"] == summary["reward_base"]
    assert not summary["identical_to_base"]
    assert summary["prompts"] == list(TEST_PROMPTS)
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.width > 800


def test_the_program_says_what_is_wrong_and_ends_with_2(model_folder, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["--base", str(model_folder), "--tuned", "nowhere", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: nowhere: no such folder")
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_the_same_model_under_two_names_is_pointed_out(model_folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    summary = evaluate(request(model_folder, model_folder, tmp_path / "out"), say=lines.append)
    assert summary["win_rate"] == 0.5
    assert any("exactly the same images as the base" in line for line in lines)


def test_no_two_images_share_their_noise(model_folder: Path, tmp_path: Path) -> None:
    prompts, seeds = images_to_draw(request(model_folder, model_folder, tmp_path))
    assert prompts == [prompt for prompt in TEST_PROMPTS[:3] for _ in range(2)]
    assert seeds == list(range(1_000_000, 1_000_006))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"steps": 0}, "--steps 0"),
        ({"batch": -1}, "--batch -1"),
        ({"guidance": 0.5}, r"--guidance 0\.5"),
        ({"first_seed": -1}, "--first_seed -1"),
        ({"first_seed": 2**63}, "--first_seed"),
        ({"first_seed": 999}, "pairs of train"),
        ({"first_seed": 300_010}, "pairs of test_unique"),
    ],
)
def test_refuses_numbers_that_cannot_be_or_seeds_of_the_pairs(model_folder, tmp_path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(request(model_folder, model_folder, tmp_path / "out", **changes))


def test_out_must_be_a_folder(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        evaluate(request(model_folder, model_folder, tmp_path / "file"))


def test_names_what_is_there_instead_of_a_model(model_folder: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"consolidate\.py"):
        find_model(str(tmp_path / "run"), base=None)
    with pytest.raises(ModelError, match="neither model_index"):
        find_model(str(tmp_path), base=None)
    with pytest.raises(ModelError, match="the base must be a whole pipeline"):
        find_model(str(tuned), base=None)
    assert find_model(str(tuned), base=find_model(str(model_folder), base=None)).rest == model_folder


def test_a_unet_that_lacks_weights_is_refused(model_folder: Path, tuned: Path) -> None:
    weights = load_file(tuned / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, tuned / WEIGHTS)
    model = find_model(str(tuned), base=find_model(str(model_folder), base=None))
    with pytest.raises(ModelError, match=r"conv_out\.bias"):
        load_pipeline(model)


def test_torn_or_missing_weights_are_refused(model_folder: Path, tuned: Path) -> None:
    model = find_model(str(tuned), base=find_model(str(model_folder), base=None))
    (tuned / WEIGHTS).write_bytes((tuned / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_pipeline(model)
    (tuned / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_pipeline(model)


def test_a_pipeline_of_another_family_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match="FluxPipeline"):
        load_pipeline(find_model(str(tmp_path), base=None))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        load_pipeline(find_model(str(tmp_path), base=None))


def test_a_diverged_model_is_refused(model_folder: Path, tuned: Path, tmp_path: Path) -> None:
    weights = load_file(tuned / WEIGHTS)
    weights["conv_out.bias"].fill_(float("nan"))
    save_file(weights, tuned / WEIGHTS)
    with pytest.raises(ModelError, match="6 of its 6 images are not finite"):
        evaluate(request(model_folder, tuned, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
