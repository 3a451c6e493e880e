import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from repository import ROOT

from ds_dpo.errors import ModelError
from ds_dpo.evaluation.drawing.named_model import ModelChoice
from ds_dpo.evaluation.run.program import evaluate
from ds_dpo.evaluation.run.request import Request
from ds_dpo.evaluation.scorers.choice import read_choices
from ds_dpo.miniature.world import TEST_PROMPTS

PROGRAM = ROOT / "scripts" / "evaluate.py"
# what scripts/miniature_seeds.py and users read
TOP_LEVEL = {
    *("n", "reward_base", "reward_tuned", "reward_sft", "reward_max", "win_rate", "win_rate_low", "win_rate_high"),
    *("win_by_margin", "loss_by_margin", "margin", "valid", "background", "identical_to_base", "models", "comparisons"),
    *("prompts", "seeds", "first_seed", "steps", "guidance", "scheduler", "versions"),
}


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


@pytest.mark.slow
def test_the_first_form_of_the_program_writes_what_it_wrote(model_folder: Path, tuned: Path, tmp_path: Path) -> None:
    """Base, control and tuned model by their roles: the miniature's prompts, seeds and reward."""
    out = tmp_path / "out"
    models = ["--base", str(model_folder), "--tuned", str(tuned), "--sft", str(model_folder)]
    command = [str(PROGRAM), *models, "--out", str(out), "--seeds", "2", "--steps", "2"]
    found = forked.run(command, env=os.environ)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    for words in ("48 images per model", "wins against base", "colour right", "grid.png", "summary.json", "page.html"):
        assert words in found.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= TOP_LEVEL
    assert (summary["n"], summary["first_seed"], summary["scheduler"]) == (48, 1_000_000, "ddim")
    assert summary["models"]["tuned"]["step"] == 7
    assert summary["models"]["base"]["step"] is None
    assert {"valid", "shape", "colour_right", "reward", "diversity"} <= summary["models"]["sft"].keys()
    by_model = {each["model"]: each for each in summary["comparisons"]}
    assert by_model["sft"]["win_rate"] == 0.5
    assert (by_model["tuned"]["win_rate"], by_model["tuned"]["against"]) == (summary["win_rate"], "base")
    assert (by_model["tuned"]["scorer"], by_model["tuned"]["prompts"]) == ("reward", "miniature")
    gain = summary["reward_tuned"] - summary["reward_base"]
    assert by_model["tuned"]["mean_difference"] == pytest.approx(gain, abs=1e-6)
    assert summary["reward_sft"] == summary["reward_base"]
    assert not summary["identical_to_base"]
    assert summary["prompts"] == list(TEST_PROMPTS)
    with Image.open(out / "grid.png") as picture:
        assert picture.width > 800


def test_the_program_says_what_is_wrong_and_ends_with_2(model_folder, tmp_path, monkeypatch, capsys) -> None:
    base, out = ["--base", str(model_folder)], ["--out", str(tmp_path / "out")]
    cases = [
        ([*base, "--tuned", "nowhere", *out], "error: nowhere: no such folder"),
        ([*base, *out], "error: --base, --tuned: give both"),
        (["--tuned", "a/b", *out], "error: --base, --tuned: give both"),
        (out, "error: --model is missing"),
        (["--model", "a/b", *out], "error: --prompts is missing"),
        (["--model", "a/b", "--prompts", "parti", *out], "error: --scorer is missing"),
        (["--model", "a/b", "--prompts", "parti", "--scorer", "nothing", *out], "error: --scorer nothing"),
        (["--model", "a/b", "--labels", "x", "y", "--prompts", "parti", *out], "error: --labels: 2 labels for 1"),
    ]
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(message)
        assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['evaluate.py', '--help']; import runpy\n"
    code += f"try: runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\nfinally: assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert found.returncode == 0, found.stderr
    assert "--scorer NAME [NAME ...]" in found.stdout


def test_a_diverged_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    unet.save_pretrained(tmp_path / "bad" / "unet")
    request = Request(
        models=(ModelChoice(str(model_folder)), ModelChoice(str(tmp_path / "bad"))),
        prompts=("miniature",),
        scorers=read_choices(["reward"]),
        out=tmp_path / "out",
        seeds=1,
        steps=1,
    )
    with pytest.raises(ModelError, match="bad: 24 of its 24 images are not finite, the first of prompt"):
        evaluate(request, say=[].append)
    assert not (tmp_path / "out" / "summary.json").exists()
