"""Checkpoints in one file, tiny ones of each family, against diffusers' own readers, and at full size by shapes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from tiny_families import CONFIGS, FAMILY, SMALL_UNETS, TEXTS, TinyModel, shipped, tiny_model

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.export.base_weights import prediction_type_of, weights_at_hand
from ds_dpo.export.pipeline import locate_pipeline
from ds_dpo.export.source import BaseModel
from ds_dpo.models.loading import (
    file_weights,
    latent_shape,
    load_denoiser,
    load_text,
    load_vae,
    peak_host_gib,
    read_noise_schedule,
)
from ds_dpo.models.pipelines.pretrained import open_pipeline
from ds_dpo.models.pipelines.single_file import SingleFile, clip_vocabulary
from ds_dpo.models.weights.derived_configs import derived_unet_config
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX, ldm_names
from ds_dpo.models.weights.parts import skeleton
from ds_dpo.models.weights.unet_shapes import known_shapes

# SSD-1B, as its configuration on the hub has it
SSD = {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}


@pytest.fixture(scope="module", params=list(SMALL_UNETS))
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("sdxl").save_file(tmp_path_factory.mktemp("file") / "sdxl.safetensors")


def of_file(path: Path, family: str = "sdxl", **more: Any) -> ModelConfig:
    return ModelConfig(pretrained=str(path), family=family, **more)  # type: ignore[arg-type]


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- tensors ----


@pytest.mark.slow
def test_every_part_is_what_was_written_and_what_diffusers_reads(tiny: TinyModel, tmp_path: Path) -> None:
    model = of_file(tiny.save_file(tmp_path / "a.safetensors"), tiny.family, prediction_type="epsilon")
    unet, vae = tiny.modules["unet"], tiny.modules["vae"]
    assert_same(load_denoiser(model, dtype=torch.float32).state_dict(), unet.state_dict())
    assert_same(load_vae(model).state_dict(), vae.state_dict())
    assert_same(convert_ldm_unet_checkpoint(tiny.single_file(), unet.config), unet.state_dict())
    assert_same(convert_ldm_vae_checkpoint(tiny.single_file(), vae.config), vae.state_dict())
    towers = load_text(model, dtype=torch.float32).towers
    for tower, (name, (_, _, prefix)) in zip(towers, TEXTS[tiny.family].items(), strict=True):
        expected = tiny.modules[name].state_dict()
        assert_same(tower.encoder.state_dict(), expected)
        assert not tower.encoder.training
        if prefix.endswith("model."):
            theirs = convert_open_clip_checkpoint(tiny.modules[name], tiny.single_file(), prefix=prefix)
            bare = {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()}
            assert all(torch.equal(bare[key.removeprefix("text_model.")], tensor) for key, tensor in expected.items())
    weights = file_weights(model)
    assert_same(dict(weights), unet.state_dict())
    number = sum(parameter.numel() for parameter in unet.parameters())
    assert peak_host_gib(model, dtype=torch.bfloat16, ranks_at_once=3) == (4 + 3 * 2) * number / 2**30


def test_the_modules_have_memory_of_their_own_in_the_dtype(sdxl_file: Path) -> None:
    first = load_denoiser(of_file(sdxl_file), dtype=torch.float32)
    assert first.training
    assert all(parameter.requires_grad for parameter in first.parameters())
    with torch.no_grad():
        first.conv_in.weight.zero_()
    again = load_denoiser(of_file(sdxl_file), dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert again.conv_in.weight.abs().max() > 0
    assert latent_shape(of_file(sdxl_file), (16, 24)) == (4, 8, 12)


def test_a_prompt_goes_through_a_file_as_its_parts_say(tmp_path: Path) -> None:
    tiny = tiny_model("sd21", vocabulary=49408)
    text = load_text(of_file(tiny.save_file(tmp_path / "a.safetensors"), "sd21"), dtype=torch.float32)
    tokens = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407, *[0] * 70]])  # "!" pads
    with torch.no_grad():
        expected = tiny.modules["text_encoder"](tokens).last_hidden_state
    assert torch.equal(text.encode(["a photo of a cat"]).text_states, expected)


# ---- full size, by shapes ----


@pytest.mark.parametrize(
    ("family", "number"),
    [("sdxl", 2_567_463_684), ("sdxl_refiner", 2_259_526_660), ("sd15", 859_520_964), ("sd21", 865_910_724)],
)
def test_shipped_unets_have_the_models_number_of_parameters(family: str, number: int) -> None:
    shapes = known_shapes(shipped(family, "unet"))
    assert shapes is not None
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == number


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sdxl_refiner", "sd15", "sd21", "ssd"])
def test_full_size_shapes_tell_the_configuration(family: str) -> None:
    usual = shipped("sdxl", "unet") | SSD if family == "ssd" else shipped(family, "unet")
    own = {name: tuple(tensor.shape) for name, tensor in skeleton(UNet2DConditionModel, usual).state_dict().items()}
    if family == "ssd":
        assert sum(torch.Size(shape).numel() for shape in own.values()) == 1_331_334_404  # "SSD-1B"
    names = ldm_names(own, usual)
    in_file = {names[name].removeprefix(UNET_PREFIX): shape for name, shape in own.items()}
    derived = derived_unet_config(in_file, shipped("sdxl", "unet") if family == "ssd" else usual)
    built = skeleton(UNet2DConditionModel, derived)
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == own
    heads = derived["attention_head_dim"]
    assert heads == usual["attention_head_dim"]


@pytest.mark.parametrize(
    ("family", "part", "number"),
    [
        ("sdxl", "text_encoder", 123_060_480),
        ("sdxl", "text_encoder_2", 694_659_840),
        ("sdxl_refiner", "text_encoder_2", 694_659_840),
        ("sd15", "text_encoder", 123_060_480),
        ("sd21", "text_encoder", 340_387_840),
        ("sd21", "vae", 83_653_863),
    ],
)
def test_shipped_encoders_have_the_models_number_of_parameters(family: str, part: str, number: int) -> None:
    module = skeleton(AutoencoderKL if part == "vae" else TEXTS[family][part][0], shipped(family, part))
    assert sum(parameter.numel() for parameter in module.parameters()) == number


# ---- the tokenizer ----


def test_the_shipped_merges_are_clips() -> None:
    vocabulary, merges = clip_vocabulary()
    assert (len(vocabulary), len(merges)) == (49408, 48894)
    known = {"!": 0, "~": 93, "i": 72, "!</w>": 256, "in": 512, "the</w>": 518, "cat</w>": 2368}
    assert {token: vocabulary[token] for token in known} == known
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)


@pytest.mark.parametrize(("name", "pad"), [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_sdxls_two_tokenizers_differ_in_what_pads(sdxl_file: Path, name: str, pad: int) -> None:
    tokenizer = SingleFile(sdxl_file).tokenizer(name)
    tokens = tokenizer(["A photo of a Cat"], padding="max_length").input_ids[0]
    # ids of openai/CLIP's clip.tokenize
    assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70]
    assert all(path.is_file() for path in SingleFile(sdxl_file).tokenizer_files(name))


# ---- what the UNet predicts ----


FLAG = torch.zeros(0)


@pytest.mark.parametrize(
    ("family", "flags", "stated", "asked", "expected"),
    [
        ("sdxl", [], {}, None, "epsilon"),
        ("sdxl", ["v_pred"], {}, None, "v_prediction"),
        ("sdxl", [], {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("sdxl", ["v_pred"], {}, "epsilon", "epsilon"),
        ("sd21", [], {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ("sd21", [], {}, "epsilon", "epsilon"),
        ("sd21", [], {}, "v_prediction", "v_prediction"),
    ],
)
def test_the_prediction_type_is_the_runs_else_the_files_else_the_familys(
    tmp_path: Path, family: str, flags: list[str], stated: dict[str, str], asked: Any, expected: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**headless(family), **{flag: FLAG for flag in flags}}, path, metadata=stated)
    assert read_noise_schedule(of_file(path, family, prediction_type=asked)).prediction_type == expected


def test_what_an_sd21_file_predicts_must_be_said(tmp_path: Path) -> None:
    save_file(headless("sd21"), tmp_path / "a.safetensors")
    with pytest.raises(
        ModelError, match=r"does not state what its UNet predicts.*model.prediction_type to v_prediction"
    ):
        read_noise_schedule(of_file(tmp_path / "a.safetensors", "sd21"))


def test_files_of_zero_terminal_snr_and_of_edm_are_known_by_their_flags(tmp_path: Path) -> None:
    usual = headless("sdxl")
    for name, flags in (("ddpm", []), ("ztsnr", ["v_pred", "ztsnr"]), ("edm", ["edm_mean", "edm_std"])):
        save_file({**usual, **{flag: FLAG for flag in flags}}, tmp_path / f"{name}.safetensors")
    assert read_noise_schedule(of_file(tmp_path / "ddpm.safetensors")).alphas_cumprod[-1] > 0.004
    assert read_noise_schedule(of_file(tmp_path / "ztsnr.safetensors")).alphas_cumprod[-1] < 1e-6
    with pytest.raises(ModelError, match="trained with EDM's noising"):
        read_noise_schedule(of_file(tmp_path / "edm.safetensors"))


def headless(family: str) -> dict[str, torch.Tensor]:
    """Names by which a file's family is known."""
    prefixes = [UNET_PREFIX, "first_stage_model.", *(prefix for _, _, prefix in TEXTS[family].values())]
    return {f"{prefix}a": torch.zeros(1) for prefix in prefixes}


# ---- other files ----


@pytest.mark.parametrize("family", ["sdxl", "sdxl_refiner", "sd15", "sd21"])
def test_a_file_of_another_family_is_named(tmp_path: Path, family: str) -> None:
    save_file(headless(family), tmp_path / "a.safetensors")
    other = "sd15" if family == "sdxl" else "sdxl"
    with pytest.raises(ModelError, match=rf"family {other}, but .* of {family}; set model.family to {family}"):
        open_pipeline(of_file(tmp_path / "a.safetensors", other))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA, not a model"),
        (["unet.down_blocks.0.to_q.lora_A.weight"], "a LoRA, not a model"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight"],
            "a UNet without text encoder or VAE; .*model.denoiser_init",
        ),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet without text encoder or VAE; .*model.denoiser_init"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX.1.*only single files of sdxl"),
        (
            ["model.diffusion_model.joint_blocks.0.x"],
            "Stable Diffusion 3 in one file; give a diffusers folder as model.pretrained and this file as",
        ),
        (
            ["model.diffusion_model.out.2.scale_weight"],
            r"out\.2\.scale_weight scales weights of 8 bits; give a file of",
        ),
        (["encoder.conv_in.weight"], "not a checkpoint of sdxl, .*its first tensor is 'encoder.conv_in.weight'"),
    ],
)
def test_what_a_file_is_instead_of_a_checkpoint_is_said(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=message):
        open_pipeline(of_file(tmp_path / "a.safetensors"))


def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "sd.ckpt").touch()
    with pytest.raises(ModelError, match=r"sd.ckpt is a pickle, which can run .*from_single_file.*save_pretrained"):
        open_pipeline(of_file(tmp_path / "sd.ckpt"))
    with pytest.raises(ModelError, match=r"model.pretrained sd_xl.safetensors: no such file or folder"):
        open_pipeline(of_file(Path("sd_xl.safetensors")))


@pytest.mark.parametrize(("field", "value"), [("variant", "fp16"), ("revision", "main")])
def test_options_that_one_file_would_ignore_are_errors(sdxl_file: Path, field: str, value: str) -> None:
    with pytest.raises(ModelError, match=f"model.{field} {value} has no effect on one file"):
        open_pipeline(of_file(sdxl_file, **{field: value}))


@pytest.mark.parametrize(
    ("load", "part", "lost"),
    [
        (partial(load_denoiser, dtype=torch.float32), "UNet", "model.diffusion_model.input_blocks.4.1.norm.bias"),
        (load_vae, "VAE", "first_stage_model.decoder.conv_in.bias"),
        (partial(load_text, dtype=torch.float32), "text_encoder_2", "conditioner.embedders.1.model.ln_final.bias"),
    ],
)
def test_a_missing_tensor_is_named(sdxl_file: Path, tmp_path: Path, load: Any, part: str, lost: str) -> None:
    tensors = load_file(sdxl_file)
    del tensors[lost]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"its {part} lacks 1 tensors, such as {lost}"):
        load(of_file(tmp_path / "a.safetensors"))


def test_tensors_that_no_unet_of_the_family_has_are_named(sdxl_file: Path, tmp_path: Path) -> None:
    more = {f"{UNET_PREFIX}input_blocks.4.1.extra.weight": torch.zeros(1)}
    save_file({**load_file(sdxl_file), **more}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors that no UNet of sdxl has, such as .*extra.weight; give a"):
        load_denoiser(of_file(tmp_path / "a.safetensors"), dtype=torch.float32)


def test_an_export_finds_its_base_in_one_file(sdxl_file: Path, tmp_path: Path) -> None:
    base = BaseModel(str(sdxl_file))
    found = weights_at_hand(base)
    assert found is not None
    assert_same(dict(found), tiny_model("sdxl").modules["unet"].state_dict())
    assert prediction_type_of(base) == "epsilon"
    with pytest.raises(ModelError, match=r"is one file; --format single-file --base_file"):
        locate_pipeline(base, replaced="unet")
    save_file(headless("sd21"), tmp_path / "a.safetensors")
    assert prediction_type_of(BaseModel(str(tmp_path / "a.safetensors"))) is None


def test_shipped_pipelines_name_their_parts() -> None:
    assert sorted(folder.name for folder in CONFIGS.iterdir() if folder.name != "clip") == sorted(set(FAMILY.values()))
    for family in set(FAMILY.values()):
        for part in ("unet", "vae", *TEXTS[family]):
            assert (CONFIGS / family / part / "config.json").is_file()
