"""Exported files, as ComfyUI, A1111 and kohya's sd-scripts read them by their own rules."""

import json
import re
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
import yaml
from clients import comfy_sampling, kohya_modules, webui_sampling
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model
from unet_shapes import SD15, SDXL, TINY_SDXL, tiny_unet
from zero_checkpoint import save_run

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import CheckpointError, ConfigError, DsDpoError, ModelError
from ds_dpo.export import destination
from ds_dpo.export.clients import sampling_remarks
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request
from ds_dpo.export.single_file import check_carried
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.families.unet import UNET
from ds_dpo.models.loading import read_noise_schedule
from ds_dpo.models.weights.files import read_json, shipped_configs
from ds_dpo.models.weights.unet_shapes import UNSEEN_SETTINGS

NODE = "ModelSamplingDiscrete"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The miniature with a tiny UNet in place of its own."""
    folder = tmp_path_factory.mktemp("pipeline") / "base"
    model = resolve_asset("ds_dpo://assets/miniature/model")
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("unet"))
    tiny_unet(TINY_SDXL, seed=0).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def run(tmp_path, pipeline):
    base = UNet2DConditionModel.from_pretrained(str(pipeline), subfolder="unet")
    generator = torch.Generator().manual_seed(1)
    tuned = {name: w + 0.01 * torch.randn(w.shape, generator=generator) for name, w in base.state_dict().items()}
    save_run(tmp_path / "run", tuned, base=pipeline, config=base.config)
    return tmp_path / "run"


def trained_with(run, prediction_type, zero_snr):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["prediction_type"] = prediction_type
    config["diffusion"] = {"zero_terminal_snr": zero_snr}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def export(run, out, **options):
    said = []
    consolidate(Request(source=run, out=out, **options), say=said.append)
    return "\n".join(said)


def names_in(path):
    """In the order of the file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


# ---- what a single file says of its training ----


@pytest.mark.parametrize("base_flags", [[], ["v_pred"], ["v_pred", "ztsnr"], ["edm_mean", "edm_std"]])
@pytest.mark.parametrize(
    ("predicts", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("epsilon", True)]
)
def test_a_whole_file_is_sampled_as_the_run_trained(run, tmp_path, predicts, zero_snr, base_flags):
    trained_with(run, predicts, zero_snr)
    # seven bytes first, which make the places behind them odd
    odd = {"odd": torch.arange(7, dtype=torch.uint8)}
    unet = {name: torch.ones(t.shape) for name, t in single_file_of(run, tmp_path).items()}
    save_file({**unet, **odd, **{name: torch.zeros(0) for name in base_flags}}, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    said = export(run, out, format="single-file", base_file=tmp_path / "base.safetensors")
    found = load_file(out)
    assert found["odd"].tolist() == list(range(7))
    assert {name for name in found if found[name].numel() == 0} == {
        *(["v_pred"] if predicts == "v_prediction" else []),
        *(["ztsnr"] if zero_snr else []),
    }
    assert webui_sampling(found, is_sdxl=True) == (predicts, zero_snr)
    seen = comfy_sampling(found, is_sdxl=True)
    # ComfyUI has no flag for an epsilon model of zero terminal SNR
    assert seen == ((predicts, zero_snr) if predicts == "v_prediction" else ("epsilon", False))
    assert (NODE in said) == (seen != (predicts, zero_snr))
    assert "copied 1 tensors of the base file" in said


def single_file_of(run, tmp_path):
    export(run, tmp_path / "alone.safetensors", format="single-file")
    return {name: tensor for name, tensor in load_file(tmp_path / "alone.safetensors").items() if tensor.numel()}


@pytest.mark.parametrize(
    ("predicts", "zero_snr", "settings"),
    [
        ("epsilon", False, None),
        ("v_prediction", False, "(v_prediction)"),
        ("v_prediction", True, "(v_prediction, zsnr)"),
    ],
)
def test_a_denoiser_alone_names_the_node_that_it_needs(run, tmp_path, predicts, zero_snr, settings):
    trained_with(run, predicts, zero_snr)
    said = export(run, tmp_path / "out.safetensors", format="single-file")
    names = names_in(tmp_path / "out.safetensors")
    assert comfy_sampling(names, is_sdxl=True, from_diffusion_models=True) == ("epsilon", False)
    assert (f"{NODE} {settings}" in said) == (settings is not None)
    assert ({"v_pred", "ztsnr"} & set(names)) == {
        *(["v_pred"] if predicts == "v_prediction" else []),
        *(["ztsnr"] if zero_snr else []),
    }


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.denoiser is UNET])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_family_is_sampled_as_it_was_trained_or_names_the_node(family, predicts, zero_snr):
    scheduler = {"prediction_type": predicts, "rescale_betas_zero_snr": zero_snr}
    names = ({"v_pred"} if predicts == "v_prediction" else set()) | ({"ztsnr"} if zero_snr else set())
    seen = comfy_sampling(names, is_sdxl=family == "sdxl")
    if family == "sd21" and not zero_snr:
        seen = (predicts, False)  # by its weights
    said = sampling_remarks(scheduler, FAMILIES[family], is_whole=True)
    assert any(NODE in line for line in said) == (seen != (predicts, zero_snr))


def test_a_base_that_is_gone_is_said_where_the_run_does_not_say_what_it_predicts(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["pretrained"] = "/gone/sdxl"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    said = export(run, tmp_path / "out.safetensors", format="single-file")
    assert "the base's scheduler is not at hand, so nothing says what the model predicts" in said
    assert f"{NODE} (v_prediction" in said


def test_a_base_whose_training_is_not_known_keeps_its_flags(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["pretrained"] = "/gone/sdxl"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    save_file({**single_file_of(run, tmp_path), "v_pred": torch.zeros(0)}, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    export(run, out, format="single-file", base_file=tmp_path / "base.safetensors")
    assert "v_pred" in names_in(out)


def test_our_own_file_comes_back_with_its_prediction_and_schedule(run, tmp_path):
    trained_with(run, "v_prediction", True)
    whole = tiny_model("sdxl").single_file()
    others = {name: tensor for name, tensor in whole.items() if not name.startswith("model.")}
    save_file({**single_file_of(run, tmp_path), **others}, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    export(run, out, format="single-file", base_file=tmp_path / "base.safetensors")
    schedule = read_noise_schedule(ModelConfig(pretrained=str(out)))
    assert schedule.prediction_type == "v_prediction"
    assert schedule.alphas_cumprod[-1] < 1e-6


# ---- settings that no single file holds ----


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("sdxl", {}, None),
        ("sdxl", {"attention_head_dim": [10, 20, 40]}, r"attention_head_dim is \[10, 20, 40\], but .* \[5, 10, 20\]"),
        ("sdxl", {"attention_head_dim": 8}, r"attention_head_dim is \[8, 8, 8\]"),
        ("sd15", {"attention_head_dim": 8}, None),
        ("sd15", {"attention_head_dim": [8, 8, 8, 8]}, None),
        ("sd15", {"attention_head_dim": [5, 10, 20, 20]}, r"attention_head_dim is \[5, 10, 20, 20\]"),
        ("sd21", {"attention_head_dim": 8}, r"\[8, 8, 8, 8\], but .* \[5, 10, 20, 20\]"),
        ("sdxl_refiner", {"norm_num_groups": 16}, r"norm_num_groups is 16, but .* 32"),
        ("sdxl", {"act_fn": "gelu"}, r"act_fn is gelu"),
        ("sdxl", {"sample_size": 96, "upcast_attention": True, "dropout": 0.1}, None),
        # widths of a smaller model of the family, which readers give the family's heads
        ("sdxl", {"block_out_channels": [128, 256, 512], "attention_head_dim": [2, 4, 8]}, None),
        ("sdxl", {"block_out_channels": [128, 256, 512], "attention_head_dim": [4, 8, 16]}, r"\[2, 4, 8\]"),
    ],
)
def test_a_unet_that_a_single_file_cannot_carry_is_refused(family, changed, said):
    config = {**read_json(shipped_configs(family) / "unet" / "config.json"), **changed}
    if said is None:
        check_carried(config)
        return
    with pytest.raises(ModelError, match=said + ".*use --format denoiser or pipeline"):
        check_carried(config)


def test_the_usual_configurations_are_carried():
    for config in (SDXL, SD15):
        check_carried(config)


def test_unseen_settings_have_the_defaults_of_diffusers():
    default = UNet2DConditionModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    assert {name: default.config[name] for name in UNSEEN_SETTINGS} == UNSEEN_SETTINGS


# ---- a pipeline of a base with weights of a variant ----


def renamed(pipeline, folder, *, variant, only=None):
    """A copy of a pipeline whose weights have a variant's names, as save_pretrained(variant=...) writes them."""
    shutil.copytree(pipeline, folder)
    for path in folder.rglob("*.safetensors"):
        if only is None or path.parent.name in only:
            path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("variant", "only"),
    [("fp16", None), ("bf16", None), ("fp16", {"vae"}), ("fp16", {"text_encoder", "text_encoder_2"})],
)
def test_a_base_of_a_variant_gives_a_whole_pipeline(run, tmp_path, pipeline, variant, only):
    base = renamed(pipeline, tmp_path / "b16", variant=variant, only=only)
    if variant != "fp16":  # whose denoiser the export does not find
        shutil.rmtree(base / "unet")
        shutil.copytree(pipeline / "unet", base / "unet")
    out = tmp_path / "out"
    export(run, out, format="pipeline", base=str(base))
    for component in ("text_encoder", "text_encoder_2", "vae"):
        (own,) = (pipeline / component).glob("*.safetensors")
        assert (out / component / own.name).read_bytes() == own.read_bytes()
    export(run, out, format="pipeline", vae=str(base))
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_plain_weights_win_over_a_variant_that_was_not_asked_for(run, tmp_path, pipeline):
    base = shutil.copytree(pipeline, tmp_path / "both")
    plain = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"a": torch.zeros(1)}, base / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    export(run, tmp_path / "out", format="pipeline", base=str(base))
    assert (tmp_path / "out" / "vae" / plain.name).read_bytes() == plain.read_bytes()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda base: next((base / "text_encoder").glob("*.safetensors")).unlink(),
            "text_encoder: has no weights of its CLIP",
        ),
        (lambda base: next((base / "vae").glob("*.safetensors")).unlink(), "vae: has no weights of its AutoencoderKL"),
        (
            lambda base: [path.unlink() for path in (base / "tokenizer").iterdir()],
            "tokenizer: has no file of a CLIPTokenizer",
        ),
        (lambda base: shutil.rmtree(base / "scheduler"), "scheduler: missing"),
        (lambda base: torn(next((base / "vae").glob("*.safetensors"))), "vae.*cannot be read as safetensors"),
    ],
)
def test_an_incomplete_pipeline_is_refused(run, tmp_path, pipeline, damage, said):
    base = shutil.copytree(pipeline, tmp_path / "base")
    damage(base)
    (tmp_path / "outs").mkdir()
    with pytest.raises(DsDpoError, match=said):
        export(run, tmp_path / "outs" / "out", format="pipeline", base=str(base))
    assert list((tmp_path / "outs").iterdir()) == []


def torn(path):
    path.write_bytes(path.read_bytes()[:1000])


# ---- LoRAs ----


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_kohya_reads_the_file_and_what_it_ignores_is_said(run, tmp_path, dtype):
    said = export(run, tmp_path / "a.safetensors", format="lora", rank=2, lora_naming="kohya", dtype=dtype)
    names = names_in(tmp_path / "a.safetensors")
    modules = {name.split(".")[0].removeprefix("lora_unet_") for name in names}
    ignored = modules - kohya_modules(names)
    # linear_1 and linear_2 of both embeddings, conv_in, conv_out
    assert ignored == {
        *("conv_in", "conv_out", "label_emb_0_0", "label_emb_0_2"),
        *("time_embedding_linear_1", "time_embedding_linear_2"),
    }
    assert re.search(
        rf"ignores 6 of {len(modules)} layers .*hold \d+\.\d\d% of the change.*--lora_targets attention", said
    )


def test_a_lora_of_attention_is_applied_whole(run, tmp_path):
    options = {"format": "lora", "rank": 2, "lora_naming": "kohya", "lora_targets": "attention"}
    said = export(run, tmp_path / "a.safetensors", **options)
    names = names_in(tmp_path / "a.safetensors")
    modules = {name.split(".")[0].removeprefix("lora_unet_") for name in names}
    assert modules
    assert all("_attentions_" in module for module in modules)
    # in the order of the file, and in that of the alphabet, in which older versions of safetensors read
    assert kohya_modules(names) == kohya_modules(sorted(names)) == modules
    assert "ignores" not in said
    assert "left out by --lora_targets attention" in said


def test_the_names_of_diffusers_say_that_other_programs_miss_a_part(run, tmp_path):
    said = export(run, tmp_path / "a", format="lora", rank=2)
    assert re.search(r"use: pipeline.load_lora_weights.*ComfyUI, Forge and A1111 .*--lora_naming kohya", said)


def test_the_disk_needs_room_for_the_file_alone_and_before_the_work(run, tmp_path, monkeypatch):
    export(run, tmp_path / "a.safetensors", format="lora", rank=2)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        num_bytes = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    free = {"bytes": num_bytes}
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: SimpleNamespace(free=free["bytes"]))
    export(run, tmp_path / "b.safetensors", format="lora", rank=2)
    free["bytes"] -= 1
    said = []
    with pytest.raises(CheckpointError, match=r"are free, but the export needs"):
        consolidate(Request(source=run, out=tmp_path / "new" / "c.safetensors", format="lora", rank=2), say=said.append)
    assert not any("distance from the base" in line for line in said)
    assert not (tmp_path / "new").exists()


def test_targets_of_a_trained_lora_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="--lora_targets attention: --format denoiser ignores it"):
        export(run, tmp_path / "a", lora_targets="attention")
