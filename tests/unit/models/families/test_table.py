"""Each family's conditioning and target against diffusers' pipelines, and a step of the refiner and of SD2.1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from repository import ROOT
from tiny_families import SMALL_UNETS, shipped
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.families import FAMILY_NAMES, LIMITS
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.miniature.models import make_tokenizer, make_vae
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.families.family import TextConfig
from ds_dpo.models.families.sdxl import refiner_extras
from ds_dpo.models.families.table import FAMILIES, family_of
from ds_dpo.models.families.unet import UNET
from ds_dpo.models.loading import load_denoiser, load_text, read_noise_schedule
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.step.preference_step import PreferenceStep

PROMPTS = ["a red circle", "", "a blue square"]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def text_config(**more: Any) -> CLIPTextConfig:
    tokens = make_tokenizer(pad_token="!")
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "vocab_size": len(tokens)}
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2}
    return CLIPTextConfig(**ids, **small, projection_dim=64, max_position_embeddings=16, **more)


def tiny_unet(family: str) -> Any:
    return UNet2DConditionModel.from_config({**shipped(family, "unet"), **SMALL_UNETS[family], "sample_size": 8})


def text_encoders_of_width(pooled_width: int) -> TextConfig:
    return lambda name: {"projection_dim": pooled_width}


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelConfig]:
    torch.manual_seed(1)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=make_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer_2=make_tokenizer(pad_token="!"),
        unet=tiny_unet("sdxl_refiner"),
        scheduler=DDPMScheduler(**SCHEDULE),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("refiner")
    pipeline.save_pretrained(folder)
    return pipeline, ModelConfig(pretrained=str(folder), family="sdxl_refiner")


@pytest.fixture(scope="module")
def sd21(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelConfig]:
    torch.manual_seed(2)
    pipeline = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=CLIPTextModel(text_config(hidden_act="gelu")).eval(),
        tokenizer=make_tokenizer(pad_token="!"),
        unet=tiny_unet("sd21"),
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("sd21")
    pipeline.save_pretrained(folder)
    return pipeline, ModelConfig(pretrained=str(folder), family="sd21")


def test_the_refiners_prompts_and_sizes_are_those_of_its_pipeline(refiner: tuple[Any, ModelConfig]) -> None:
    pipeline, model = refiner
    with torch.no_grad():
        text_states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    encoded = load_text(model, dtype=torch.float32).encode(PROMPTS)
    assert torch.equal(encoded.text_states, text_states)
    assert encoded.pooled is not None
    assert torch.equal(encoded.pooled, pooled)
    theirs, _ = pipeline._get_add_time_ids(
        (600, 800), (3, 7), (512, 512), 6.0, 2.5, (600, 800), (0, 0), (512, 512), torch.float32, 64
    )
    ours = refiner_extras(torch.tensor([[600.0, 800.0, 3.0, 7.0, 512.0, 512.0]]))["time_ids"]
    assert torch.equal(ours, theirs)


def test_sd21s_prompts_are_those_of_its_pipeline(sd21: tuple[Any, ModelConfig]) -> None:
    pipeline, model = sd21
    with torch.no_grad():
        text_states, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    encoded = load_text(model, dtype=torch.float32).encode(PROMPTS)
    assert torch.equal(encoded.text_states, text_states)
    assert encoded.pooled is None


def batch_for(model: ModelConfig) -> PreferenceBatch:
    """B = 2 pairs, N = 4 images."""
    family, text = FAMILIES[model.family], load_text(model, dtype=torch.float32).encode(PROMPTS[:2])
    generator = torch.Generator().manual_seed(7)
    sizes = torch.tensor([[64.0, 32.0, 0.0, 4.0, 32.0, 32.0]] * 4)
    return PreferenceBatch(
        latents=torch.randn(4, 4, 8, 8, generator=generator),
        noise=torch.randn(2, 4, 8, 8, generator=generator),
        timesteps=torch.tensor([20, 180]),
        text_states=text.text_states,
        pooled=text.pooled,
        extras=family.extras(sizes),
        pair_ids=torch.tensor([1, 2]),
        target_probabilities=torch.ones(2),
        weights=torch.ones(2),
    )


@pytest.mark.parametrize("name", ["refiner", "sd21"])
def test_a_step_compares_with_diffusers_own_target_and_reaches_every_weight(
    name: str, request: pytest.FixtureRequest
) -> None:
    _, model = request.getfixturevalue(name)
    policy = load_denoiser(model, dtype=torch.float32)
    step = PreferenceStep(
        policy=policy,
        predict=predict_by_unet,
        reference=FrozenCopy(policy, predict=predict_by_unet, dtype=torch.float32, device="cpu"),
        schedule=read_noise_schedule(model),
        objective=OBJECTIVES["dpo"],
        options={"beta": 10.0},
    )
    batch = batch_for(model)
    assert step.largest_difference(batch) == 0
    output = step(batch)
    assert output.loss.item() == pytest.approx(0.6931471805599453, abs=1e-7)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())

    theirs = DDPMScheduler(**SCHEDULE)
    noise, timesteps = batch.noise.repeat(2, 1, 1, 1), batch.timesteps.repeat(2)
    target = noise if name == "refiner" else theirs.get_velocity(batch.latents, noise, timesteps)
    told = {}
    if name == "refiner":
        assert batch.pooled is not None
        told = {"text_embeds": batch.pooled.repeat(2, 1), "time_ids": torch.tensor([[64.0, 32.0, 0.0, 4.0, 6.0]] * 4)}
    with torch.no_grad():
        noisy = theirs.add_noise(batch.latents, noise, timesteps)
        predicted = policy(noisy, timesteps, batch.text_states.repeat(2, 1, 1), added_cond_kwargs=told).sample
    expected = (predicted - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(output.pair_quantities["policy_chosen_error"], expected[:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.pair_quantities["policy_rejected_error"], expected[2:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.denoiser is UNET])
def test_shipped_unets_are_of_their_own_family(family: str) -> None:
    config = shipped(family, "unet")
    assert family_of(config, text_encoders_of_width(1280)) is FAMILIES[family]
    assert family_of(config) is FAMILIES[family], "where no text encoder is at hand"


def test_unets_of_no_family_are_told() -> None:
    sdxl, text_config = shipped("sdxl", "unet"), text_encoders_of_width(1280)
    assert family_of({**sdxl, "projection_class_embeddings_input_dim": 1280 + 4 * 256}, text_config) is None
    assert family_of({**sdxl, "projection_class_embeddings_input_dim": 1280}, text_config) is None
    assert family_of({**sdxl, "addition_embed_type": "image"}, text_config) is None
    assert family_of({**sdxl, "addition_embed_type": "image"}) is None
    assert family_of(sdxl, text_encoders_of_width(1281)) is None


def test_every_name_has_a_row_that_agrees_with_its_limits() -> None:
    assert tuple(FAMILIES) == FAMILY_NAMES == tuple(LIMITS)
    for name, family in FAMILIES.items():
        assert family.name == name
        assert LIMITS[family.name].takes_sizes == bool(family.extras(torch.zeros(1, 6)))
        texts = family.text_encoders.values()
        assert all(text.num_tokens is not None for text in texts if text.may_be_absent), "its zeros need a length"


def test_base_and_refiner_are_told_apart(refiner: tuple[Any, ModelConfig], sdxl: ModelConfig) -> None:
    for model, other in ((refiner[1], "sdxl"), (sdxl, "sdxl_refiner")):
        with pytest.raises(ModelError, match=rf"family {other}, but .* is of family {model.family}"):
            load_denoiser(model.model_copy(update={"family": other}), dtype=torch.float32)


def test_the_refiners_folder_needs_no_first_text_encoder(refiner: tuple[Any, ModelConfig]) -> None:
    assert not Path(refiner[1].pretrained, "text_encoder").exists()
    assert len(load_text(refiner[1], dtype=torch.float32).towers) == 1


@pytest.mark.slow
def test_the_table_is_read_without_the_libraries_of_its_models() -> None:
    """Exports look into it, and would wait for seconds."""
    program = (
        "import sys, ds_dpo.models.families.table; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
