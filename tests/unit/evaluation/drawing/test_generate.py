import itertools
import json
import os
import runpy
import sys
from pathlib import Path

import forked
import peft
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file, save_file
from whole_file import small_sdxl, write_whole_file

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.evaluation.drawing.generate import Request, generate, short_labels
from ds_dpo.evaluation.drawing.named_model import Lora, ModelChoice, parse_lora
from ds_dpo.evaluation.drawing.prompt_file import Drawing, list_drawings
from ds_dpo.models.sampler import ddim_from
from ds_dpo.models.weights.ldm_keys import ldm_names

PROGRAM = ROOT / "scripts" / "generate.py"
MINIATURE = resolve_asset("ds_dpo://assets/miniature/model")
RED, BLUE = "a red circle on a white background", "a blue square on a black background"


def draw(out: Path, *models: str | ModelChoice, **changes) -> dict:
    choices = tuple(model if isinstance(model, ModelChoice) else ModelChoice(model) for model in models)
    settings = {"prompts": (RED,), "steps": 3, "guidance": 1.0, **changes}
    return generate(Request(models=choices, out=out, **settings), say=lambda line: None)


def images_of(out: Path, record: dict, label: str) -> list[Image.Image]:
    return [Image.open(out / entry["files"][label]) for entry in record["images"]]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(*image.size, 3).int()


@pytest.fixture(scope="session")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a UNet alone, of step 7, under a variant's name; it draws other images than the miniature."""
    unet = UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.7)
    folder = tmp_path_factory.mktemp("my_run") / "export"
    unet.to(torch.float16).save_pretrained(folder / "unet", variant="fp16")
    (folder / "export.json").write_text('{"step": 7, "files": []}')
    return folder


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the miniature that changes what it draws."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(MINIATURE)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora") / "my_lora"
    pipeline.save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet))
    return folder


# ---- the program, whole ----


@pytest.mark.slow
def test_the_program_draws_models_side_by_side(changed, lora, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{BLUE}\n\n", encoding="utf-8")
    out = tmp_path / "out"
    command = [str(PROGRAM), "--model", MINIATURE, "--model", str(changed), "--model", MINIATURE]
    command += [
        "--lora",
        f"{lora}:0.5",
        "--prompt",
        RED,
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--seeds",
        "5",
        "6",
    ]
    command += ["--num-inference-steps", "3", "--guidance_scale", "1.5", "--batch", "3", "--out", str(out)]
    found = forked.run(command, env=os.environ)
    assert (found.returncode, found.stderr) == (0, "")
    assert "4 images with each of 3 models, on cpu in fp32" in found.stdout
    record = json.loads((out / "record.json").read_text())
    labels = ["miniature/model", f"{changed.parent.name}/export", "miniature/model + my_lora x 0.5"]
    assert list(record["models"]) == labels
    assert record["models"][labels[1]]["step"] == 7
    assert record["models"][labels[2]]["loras"] == [{"name": str(lora), "scale": 0.5}]
    assert [(entry["prompt"], entry["seed"]) for entry in record["images"]] == [
        (RED, 5),
        (RED, 6),
        (BLUE, 5),
        (BLUE, 6),
    ]
    assert (record["steps"], record["guidance"], record["resolution"], record["dtype"]) == (3, 1.5, 32, "fp32")
    files = [Path(name) for entry in record["images"] for name in entry["files"].values()]
    assert sorted(path.relative_to(out) for path in out.rglob("*.png")) == sorted([*files, Path("grid.png")])
    image = Image.open(out / record["images"][3]["files"][labels[2]])
    assert image.size == (32, 32)
    assert image.text == {
        **{"prompt": BLUE, "seed": "6", "model": labels[2]},
        **{"steps": "3", "guidance": "1.5", "scheduler": "DDPMScheduler"},
    }
    # an image that is passed on does not tell where it was made
    assert str(tmp_path) not in str(image.text)
    _check_grid(out, record, labels)


def _check_grid(out: Path, record: dict, labels: list[str]) -> None:
    """Each image stands, 5 times as large, in its prompt's and seed's row and its model's column."""
    grid = pixels_of_rows(Image.open(out / "grid.png"))
    corners = {}
    for column, label in enumerate(labels):
        for row, image in enumerate(images_of(out, record, label)):
            tile = pixels_of_rows(image).repeat_interleave(5, 0).repeat_interleave(5, 1)
            corners[row, column] = find(grid, tile)
    tops = [{corners[row, column][0] for column in range(3)} for row in range(4)]
    lefts = [{corners[row, column][1] for row in range(4)} for column in range(3)]
    assert all(len(places) == 1 for places in tops + lefts)  # aligned
    tops, lefts = [min(places) for places in tops], [min(places) for places in lefts]
    assert all(after - before >= 160 + 14 for before, after in itertools.pairwise(tops))  # seed below
    assert all(after - before > 160 for before, after in itertools.pairwise(lefts))
    background = torch.tensor([255, 255, 255])
    beside_first = grid[tops[0] : tops[0] + 160, : lefts[0]]
    assert (beside_first != background).any()  # the prompt
    assert grid.shape[1] - lefts[-1] >= 160


def pixels_of_rows(image: Image.Image) -> torch.Tensor:
    """(height, width, 3)"""
    return pixels(image).view(image.height, image.width, 3)


def find(page: torch.Tensor, tile: torch.Tensor) -> tuple[int, int]:
    """Top and left of the one place where a tile lies in a page."""
    height, width = tile.shape[:2]
    at = (page[: page.shape[0] - height + 1, : page.shape[1] - width + 1] == tile[0, 0]).all(-1).nonzero().tolist()
    found = [(top, left) for top, left in at if torch.equal(page[top : top + height, left : left + width], tile)]
    assert len(found) == 1, found
    return found[0]


def test_the_program_says_what_is_missing(tmp_path, monkeypatch, capsys) -> None:
    for arguments, message in [
        (["--model", str(tmp_path / "absent"), "--prompt", RED], f"error: {tmp_path / 'absent'}: no such folder"),
        (["--lora", "x", "--model", MINIATURE], "--lora x needs a --model before it"),
        (["--prompt", RED], "--model"),
    ]:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


# ---- noise ----


@pytest.mark.slow
def test_an_image_is_the_same_alone_and_among_others(tmp_path) -> None:
    """With the miniature's own sampler, DDPM, which adds noise at each step."""
    together = draw(tmp_path / "a", MINIATURE, prompts=(RED, BLUE), seeds=(1, 2, 3))
    again = draw(tmp_path / "b", MINIATURE, prompts=(RED, BLUE), seeds=(1, 2, 3), batch=1)
    alone = draw(tmp_path / "c", MINIATURE, prompts=(BLUE,), seeds=(2,))
    (label,) = together["models"]
    whole = [pixels(image) for image in images_of(tmp_path / "a", together, label)]
    for one, other in zip(whole, images_of(tmp_path / "b", again, label), strict=True):
        # other batch sizes add up in another order, which rounds a few pixels to the next level
        assert (one - pixels(other)).abs().max() <= 1
    assert (whole[4] - pixels(images_of(tmp_path / "c", alone, label)[0])).abs().max() <= 1
    assert all((one - other).abs().max() > 10 for place, one in enumerate(whole) for other in whole[:place])
    draw(tmp_path / "d", MINIATURE, prompts=(RED, BLUE), seeds=(1, 2, 3))
    for name in [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png")]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


@pytest.mark.parametrize("scheduler", ["model", "ddim", "euler", "dpmpp"])
def test_it_draws_what_diffusers_draws(tmp_path, scheduler) -> None:
    record = draw(tmp_path, MINIATURE, scheduler=scheduler, guidance=4.0, seeds=(7,), steps=4)
    ((label, facts),) = record["models"].items()
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    makers = {
        "model": DDPMScheduler.from_config,
        "ddim": ddim_from,
        "euler": EulerDiscreteScheduler.from_config,
        "dpmpp": DPMSolverMultistepScheduler.from_config,
    }
    pipeline.scheduler = makers[scheduler](pipeline.scheduler.config)
    assert facts["scheduler"] == type(pipeline.scheduler).__name__
    generator = torch.Generator().manual_seed(7)
    (plain,) = pipeline(RED, num_inference_steps=4, guidance_scale=4.0, generator=generator).images
    assert (pixels(images_of(tmp_path, record, label)[0]) - pixels(plain)).abs().max() <= 1


# ---- kinds of models ----


def test_each_kind_of_model_draws_its_own_weights(tmp_path) -> None:
    """Pipeline, UNet alone and single files of the same weights draw the same."""
    pipeline = small_sdxl()
    pipeline.save_pretrained(tmp_path / "whole")
    write_whole_file(pipeline, tmp_path / "whole.safetensors")
    pipeline.unet.save_pretrained(tmp_path / "alone" / "unet")
    weights = pipeline.unet.state_dict()
    names = ldm_names(weights, pipeline.unet.config)
    save_file({names[name]: value for name, value in weights.items()}, tmp_path / "unet.safetensors")
    # another base, so that what comes from it would be seen
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(3)
    pipeline.save_pretrained(tmp_path / "base")
    kinds = ["whole", "alone", "unet.safetensors", "whole.safetensors"]
    record = draw(tmp_path / "out", *(str(tmp_path / kind) for kind in [*kinds, "base"]), base=str(tmp_path / "base"))
    *alike, base = [pixels(images_of(tmp_path / "out", record, label)[0]) for label in record["models"]]
    assert all(torch.equal(alike[0], other) for other in alike[1:])
    assert not torch.equal(alike[0], base)


@pytest.mark.slow
def test_a_lora_counts_by_its_scale(lora, tmp_path) -> None:
    (file,) = lora.glob("*.safetensors")
    choices = [
        MINIATURE,
        ModelChoice(MINIATURE, (Lora(str(lora), 0.0),)),
        ModelChoice(MINIATURE, (Lora(str(lora)),)),
        ModelChoice(MINIATURE, (Lora(str(file), 0.5), Lora(str(lora), 0.5))),
    ]
    record = draw(tmp_path, *choices)
    plain, zero, one, halves = (pixels(images_of(tmp_path, record, name)[0]) for name in record["models"])
    assert torch.equal(plain, zero)
    assert (one - plain).abs().max() > 5
    assert (one - halves).abs().max() <= 1


@pytest.mark.slow
def test_16_bits_keep_a_vae_that_would_overflow_in_fp32(tmp_path, changed) -> None:
    sound = DiffusionPipeline.from_pretrained(MINIATURE)
    sound.vae.register_to_config(force_upcast=False)
    sound.vae.save_pretrained(tmp_path / "vae")
    exact = draw(tmp_path / "a", MINIATURE)
    halves = draw(tmp_path / "b", MINIATURE, str(changed), dtype="fp16")
    fixed = draw(tmp_path / "c", MINIATURE, str(changed), dtype="fp16", vae=str(tmp_path / "vae"))
    assert {facts["vae_dtype"] for facts in halves["models"].values()} == {"float32"}
    assert {facts["vae_dtype"] for facts in fixed["models"].values()} == {"float16"}
    (label,) = exact["models"]
    first = pixels(images_of(tmp_path / "a", exact, label)[0])
    for out, record in ((tmp_path / "b", halves), (tmp_path / "c", fixed)):
        assert (pixels(images_of(out, record, label)[0]) - first).abs().max() <= 12  # the same noise, in 16 bits


def test_models_that_cannot_be_drawn_are_refused_before_the_first_is(lora, changed, tmp_path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    (tmp_path / "torn.safetensors").write_bytes(b"123")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (lora_file,) = lora.glob("*.safetensors")
    cases = {
        str(changed): r"export: holds a UNet alone; .*--base",
        str(lora): r"my_lora: a LoRA, not a model; .*--model BASE --lora",
        str(lora_file): r"a LoRA, not a model; .*--model BASE --lora",
        str(tmp_path / "other.safetensors"): r"other.safetensors: has no UNet.*'weight'",
        str(tmp_path / "model.ckpt"): r"model.ckpt: only .safetensors files are read, because others can run code",
        str(tmp_path / "torn.safetensors"): r"torn.safetensors: cannot be read as safetensors",
        str(tmp_path / "absent.safetensors"): r"absent.safetensors: no such file",
        str(tmp_path / "absent"): r"absent: no such folder",
        str(tmp_path / "run"): r"run: holds checkpoints; .*consolidate",
    }
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message):
            draw(tmp_path / "out", name)
    for name, message in {
        "other.safetensors": "not a LoRA",
        "absent": "no such file",
        "run": "has 0 .safetensors files",
    }.items():
        with pytest.raises(ModelError, match=f"--lora {tmp_path / name}: {message}"):
            draw(tmp_path / "out", MINIATURE, ModelChoice(MINIATURE, (Lora(str(tmp_path / name)),)))
    with pytest.raises(ModelError, match=r"--base .*my_lora: has no model_index.json"):
        draw(tmp_path / "out", MINIATURE, base=str(lora))
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(lora, tmp_path) -> None:
    foreign = {
        f"unet.nothing.{name}": value for name, value in load_file(lora / "pytorch_lora_weights.safetensors").items()
    }
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(ModelError, match=r"--lora .*foreign.safetensors: "):
        draw(tmp_path / "out", ModelChoice(MINIATURE, (Lora(str(tmp_path / "foreign.safetensors")),)))
    pipeline = small_sdxl()
    pipeline.save_pretrained(tmp_path / "whole")
    write_whole_file(pipeline, tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    for part in ("model.diffusion_model.out.2.weight", "conditioner.embedders.1.model.ln_final.weight"):
        save_file({k: v for k, v in tensors.items() if k != part}, tmp_path / "torn.safetensors")
        with pytest.raises(ModelError, match=r"torn.safetensors: "):
            draw(tmp_path / "out", str(tmp_path / "torn.safetensors"), base=str(tmp_path / "whole"))


def test_a_diverged_model_is_told(tmp_path) -> None:
    unet = UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    unet.save_pretrained(tmp_path / "bad" / "unet")
    with pytest.raises(ModelError, match=r"bad: 1 of its 1 images are not finite.*diverged"):
        draw(tmp_path / "out", str(tmp_path / "bad"), base=MINIATURE)
    assert not (tmp_path / "out" / "record.json").exists()


# ---- requests ----


def test_requests_that_cannot_be_drawn(tmp_path) -> None:
    for changes, message in [
        ({"prompts": ()}, "nothing to draw.*--prompt"),
        ({"steps": 0}, "--steps 0"),
        ({"batch": 0}, "--batch 0"),
        ({"guidance": 0.5}, "--guidance 0.5"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"resolution": 30}, "--resolution 30: must be a multiple of 8"),
        ({"seeds": (-1,)}, "seed -1"),
        ({"labels": ("a", "b")}, "--labels: 2 labels for 1 models"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used"),
        ({"device": "nonsense"}, "--device nonsense cannot be used"),
        ({"prompt_file": tmp_path / "absent"}, "--prompts .*absent: cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=message):
            draw(tmp_path / "out", MINIATURE, **changes)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file is a file"):
        draw(tmp_path / "file", MINIATURE)
    assert not (tmp_path / "out").exists()


def test_prompts_of_files(tmp_path) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\ufeffone\n\n  two \n", encoding="utf-8")
    assert list_drawings(["zero"], text, [1, 2, 1]) == [
        Drawing(prompt, seed) for prompt in ("zero", "one", "two") for seed in (1, 2)
    ]
    lines.write_text(
        '{"prompt": "赤い丸", "seed": 7}\n{"prompt": "two"}\n{"prompt": "two", "seed": 2}\n', encoding="utf-8"
    )
    assert list_drawings([], lines, [1, 2]) == [Drawing("赤い丸", 7), Drawing("two", 1), Drawing("two", 2)]
    for line, message in {
        "{": "line 2: not JSON",
        '{"text": "a"}': "line 2: .*must be an object",
        '["a"]': "line 2: .*must be an object",
        '{"prompt": "a", "sed": 1}': "line 2: 'sed' is not known",
        '{"prompt": "a", "seed": "1"}': "line 2: seed '1'",
        '{"prompt": "a", "seed": true}': "line 2: seed True",
    }.items():
        lines.write_text(f"\n{line}\n")
        with pytest.raises(ConfigError, match=message):
            list_drawings([], lines, [0])
    text.write_text("\n")
    with pytest.raises(ConfigError, match="has no prompt"):
        list_drawings(["a"], text, [0])


def test_lora_options() -> None:
    assert parse_lora("a/b.safetensors") == Lora("a/b.safetensors", 1.0)
    assert parse_lora("a/b.safetensors:0.8") == Lora("a/b.safetensors", 0.8)
    assert parse_lora("ds_dpo://a/b") == Lora("ds_dpo://a/b", 1.0)
    for text in ("a:nan", "a:inf", ":1", ""):
        with pytest.raises(ConfigError, match="--lora"):
            parse_lora(text)


def test_labels_tell_models_apart() -> None:
    def labels(*names: str) -> tuple[str, ...]:
        return short_labels([ModelChoice(name) for name in names])

    assert labels("/a/b/sdxl", "me/dpo.safetensors") == ("sdxl", "dpo")
    assert labels("runs/x/export/", "runs/y/export") == ("x/export", "y/export")
    assert labels("a/sdxl", "b/sdxl.safetensors") == ("sdxl", "sdxl.safetensors")
    assert labels("runs/one/s/export", "runs/two/s/export") == ("one/s/export", "two/s/export")
    with pytest.raises(ConfigError, match="have the same name and LoRAs"):
        labels("a", "a")
