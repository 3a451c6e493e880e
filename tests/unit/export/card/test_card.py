import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from PIL import Image

from ds_dpo.config.asset_paths import ASSET_PREFIX, resolve_asset
from ds_dpo.config.load import load_config
from ds_dpo.errors import ConfigError
from ds_dpo.export.card.card import (
    CardFacts,
    facts_of_run,
    is_hub_id,
    published_name,
    write_card,
)
from ds_dpo.run_folder.folder import RunFolder

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
MINIATURE = f"{ASSET_PREFIX}assets/miniature/model"
SETTINGS = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def write(folder: Path, facts: CardFacts) -> tuple[ModelCard, str]:
    write_card(folder, facts)
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard.load(folder / "README.md")
    assert str(card) == text  # what the hub's own reader makes of it is what was written
    return card, text


def run_folder(path: Path, *arguments: str) -> Path:
    config = load_config(["--config", "sdxl_pickapic", "--output_dir", str(path), *arguments]).config
    RunFolder(path).write_start(config, SETTINGS, world_size=16, data={})
    return path


def python_of(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_run_tells_what_the_card_states(tmp_path) -> None:
    run = run_folder(tmp_path / "run")
    facts = facts_of_run(run, CardFacts(format="denoiser", dtype="fp16", steps=2000, repo_id="me/sdxl-dpo"))
    card, text = write(tmp_path, facts)
    assert card.data.base_model == SDXL
    assert card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["yuvalkirstain/pickapic_v2"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.license == "openrail++"
    assert {"text-to-image", "diffusion-dpo", "stable-diffusion-xl"} <= set(card.data.tags)
    assert "lora" not in card.data.tags
    rows = dict(re.findall(r"^\| (\S[^|]*?) \| (.*) \|$", text, re.MULTILINE))
    assert rows["objective"].startswith("Diffusion-DPO, beta 5000, ")
    assert rows["data"] == "yuvalkirstain/pickapic_v2 (train)"
    assert (rows["optimizer steps"], rows["pairs a step"], rows["peak learning rate"]) == ("2000", "2048", "1e-05")
    assert rows["schedule"] == "constant_with_warmup, 200 warm-up steps"
    assert (rows["precision"], rows["sharding"], rows["ranks"], rows["seed"]) == ("bf16", "ZeRO-3", "16", "0")
    assert rows["resolution"] == "1024 px"
    assert f"torch {torch.__version__}" in rows["versions"]
    assert "2311.12908" in text
    assert "# sdxl-dpo\n" in text


def test_an_objective_has_its_own_paper(tmp_path) -> None:
    options = ("--objective.type", "mapo", "--terms.sft_weight", "0.5")
    card, text = write(tmp_path, facts_of_run(run_folder(tmp_path / "run", *options), CardFacts(format="denoiser")))
    assert "by MaPO, without a reference model ([arXiv:2406.06424](https://arxiv.org/abs/2406.06424)) with" in text
    assert "ratio_weight 0.1, snr_value 0.5, score_scale 1000, sft_weight 0.5 |" in text
    assert "2311.12908" not in text
    assert "diffusion-dpo" not in card.data.tags
    _, text = write(tmp_path, CardFacts(format="denoiser", base=SDXL, config={"objective.type": "dspo"}))
    assert "([paper](https://openreview.net/forum?id=xyfb9HHvMe))" in text
    assert "## Citation" in text, "its logit is Diffusion-DPO's"


def test_nothing_of_the_machine_is_published(tmp_path) -> None:
    secret = tmp_path / "secret_place"
    for name in ("base", "vae", "pairs"):
        (secret / name).mkdir(parents=True)
    run = run_folder(
        secret / "run",
        *("--model.pretrained", f"{secret}/base/", "--model.vae", str(secret / "vae")),
        *("--data.dataset", str(secret / "pairs"), "--deepspeed_config", str(secret / "mine.json")),
    )
    card, text = write(tmp_path, facts_of_run(run, CardFacts(format="denoiser")))
    assert "secret_place" not in text
    assert str(tmp_path) not in text
    assert platform.node() not in text
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "| base | base |" in text
    assert "| data | pairs (train) |" in text
    # a base that nobody can look up has no license that could be told
    assert card.data.license == "other"
    assert "must set `license`" in " ".join(text.split())


def test_names_are_published_where_others_can_read_them(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert published_name(SDXL) == SDXL
    assert published_name(MINIATURE) == MINIATURE
    for path in (
        "/home/me/models/sdxl",
        "./models/sdxl/",
        "~/sdxl",
        "s3://bucket/private/sdxl",
        r"C:\models\sdxl",
        "sdxl",
    ):
        assert published_name(path) == "sdxl"
        assert not is_hub_id(path)
    (tmp_path / "models" / "sdxl").mkdir(parents=True)
    assert published_name("models/sdxl") == "sdxl"  # a folder that looks like a hub id


@pytest.mark.parametrize(
    ("base", "override", "license_id", "license_name"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", None, "creativeml-openrail-m", None),
        ("stabilityai/sdxl-turbo", None, "other", "sai-nc-community"),
        ("someone/else", None, "other", None),
        (None, None, "other", None),
        ("someone/else", "mit", "mit", None),
        (SDXL, "mit", "mit", None),
        (MINIATURE, None, "apache-2.0", None),
    ],
)
def test_the_license_is_the_bases_unless_the_user_sets_it(tmp_path, base, override, license_id, license_name) -> None:
    card, text = write(tmp_path, CardFacts(format="denoiser", base=base, license=override))
    assert (card.data.license, card.data.license_name) == (license_id, license_name)
    assert ("**Not known**" in text) == (license_id == "other" and license_name is None)


def test_a_lora_is_an_adapter(tmp_path) -> None:
    facts = CardFacts(format="lora", base=SDXL, file_name="a.safetensors", details={"rank": 8}, is_ema=True)
    card, text = write(tmp_path, facts)
    assert card.data.base_model_relation == "adapter"
    assert "lora" in card.data.tags
    assert "| rank | 8 |" in text
    assert "EMA" in text


def test_a_card_without_a_run_states_what_the_export_knows(tmp_path) -> None:
    _, text = write(tmp_path, CardFacts(format="denoiser", base=SDXL, steps=7, family="sdxl"))
    table = text[text.index("| | |") : text.index("This card")]
    assert table == f"| | |\n|---|---|\n| base | {SDXL} |\n| optimizer steps | 7 |\n\n"
    assert "tuned by Diffusion-DPO ([arXiv:2311.12908](https://arxiv.org/abs/2311.12908)) with ds_dpo" in text
    assert text.startswith("---\n")
    assert text.endswith("```\n")
    assert "\n\n\n" not in text


def test_a_control_claims_no_preference_objective(tmp_path) -> None:
    card, text = write(tmp_path, CardFacts(format="denoiser", base=SDXL, config={"objective.type": "sft"}))
    assert "diffusion-dpo" not in card.data.tags
    assert "2311.12908" not in text


def test_text_of_users_cannot_break_the_card(tmp_path) -> None:
    facts = CardFacts(
        format="denoiser",
        base="a\n---\nlicense: mit",
        title='t: "x"\n# y',
        details={"note": "a | b\nc"},
        config={"data.dataset": "o'ne/#two", "optimizer.type": "{{ title }} | <b>"},
    )
    card, text = write(tmp_path, facts)
    assert card.data.license == "other"
    assert "| note | a \\| b c |" in text
    assert "| optimizer | {{ title }} \\| <b> |" in text, "a value is no template, and stays as it is"
    compile(python_of(text), "card", "exec")


def test_given_facts_stay_and_unknown_fields_of_other_versions_do_no_harm(tmp_path) -> None:
    run = run_folder(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["objective"] |= {"type": "of_tomorrow", "gamma": 0.5}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "new_section": {"a": 1}}))
    for name in ("deepspeed.json", "environment.json"):
        (run / name).unlink()
    facts = facts_of_run(run, CardFacts(format="denoiser", base="someone/else", zero_stage=0))
    assert (facts.base, facts.zero_stage, facts.precision, facts.ranks) == ("someone/else", 0, None, None)
    card, text = write(tmp_path, replace(facts, family="of_tomorrow"))
    assert "| objective | of_tomorrow, beta 5000, " in text
    assert "| sharding | ZeRO-0 |" in text
    assert (
        "tuned on [yuvalkirstain/pickapic_v2](https://huggingface.co/datasets/yuvalkirstain/pickapic_v2) by of_tomor"
        in text
    )
    assert "diffusion-dpo" not in card.data.tags
    for content in ("a: [", "just text"):
        (run / "config.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            facts_of_run(run, CardFacts(format="denoiser"))
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        facts_of_run(run, CardFacts(format="denoiser"))


# ---- the lines of Python are run as they stand, but on a CPU and small ----


def execute(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    monkeypatch.chdir(folder)
    code = python_of(text).replace('"cuda"', '"cpu"')
    code = code.replace("guidance_scale=5.0", "guidance_scale=5.0, num_inference_steps=1")
    exec(compile(code, "card", "exec"), {})
    return Image.open("pelican.png")


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    """A folder that holds the shipped miniature as an export called `mine`, in fp32."""
    pipeline = DiffusionPipeline.from_pretrained(resolve_asset(MINIATURE), torch_dtype=torch.float32)
    pipeline.save_pretrained(tmp_path / "mine")
    return tmp_path


@pytest.mark.parametrize("export_format", ["pipeline", "denoiser"])
def test_the_python_of_the_card_draws(miniature, monkeypatch, export_format) -> None:
    if export_format == "denoiser":
        UNet2DConditionModel.from_pretrained(miniature / "mine", subfolder="unet").save_pretrained(
            miniature / "alone" / "unet"
        )
    title = "alone" if export_format == "denoiser" else "mine"
    facts = CardFacts(format=export_format, title=title, base=MINIATURE, dtype="fp32")
    assert execute(write(miniature, facts)[1], miniature, monkeypatch).size == (32, 32)


def test_the_python_of_a_lora_draws(miniature, monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    pipeline = DiffusionPipeline.from_pretrained(miniature / "mine")
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers = peft.get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(miniature / "small", unet_lora_layers=layers)
    facts = CardFacts(
        format="lora",
        title="small",
        base=str(miniature / "mine"),
        dtype="fp32",
        file_name="pytorch_lora_weights.safetensors",
    )
    assert execute(write(miniature, facts)[1], miniature, monkeypatch).size == (32, 32)


def test_a_single_file_is_found_on_the_hub_and_on_disk(tmp_path) -> None:
    whole = CardFacts(format="single-file", title="mine", file_name="m.safetensors", base=SDXL, family="sdxl")
    assert 'StableDiffusionXLPipeline.from_single_file("mine/m.safetensors"' in python_of(write(tmp_path, whole)[1])
    alone = CardFacts(
        format="single-file",
        repo_id="me/mine",
        file_name="m.safetensors",
        base=SDXL,
        family="sd15",
        holds_denoiser_only=True,
    )
    code = python_of(write(tmp_path, alone)[1])
    compile(code, "card", "exec")
    assert 'from_single_file(\n    "https://huggingface.co/me/mine/blob/main/m.safetensors", config="' + SDXL in code
