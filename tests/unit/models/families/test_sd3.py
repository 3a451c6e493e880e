"""Stable Diffusion 3 against diffusers' own pipeline and transformer, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_sd3 import LATENT_CHANNELS, SHAPES, save_tiny_sd3, tiny_transformer

from ds_dpo.batch import Conditioning
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.denoiser.predict import predict_by_sd3_transformer
from ds_dpo.models.families.table import FAMILIES, family_of
from ds_dpo.models.layout import read_row_major
from ds_dpo.models.loading import describe_loading, latent_shape, load_denoiser, load_text, load_vae
from ds_dpo.models.pipelines.pretrained import open_pipeline
from ds_dpo.models.policy_start import open_policy_start
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.models.vae import encode_images
from ds_dpo.models.weights.sd3_shapes import sd3_shapes

LONG = "a red circle on a blue background " * 4  # more than the 16 tokens of the CLIPs, fewer than the 256 of T5
PROMPTS = ["a red circle on a white background", "", LONG, "an aardvark, surely", "日本"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(pretrained=str(save_tiny_sd3(tmp_path_factory.mktemp("sd3"))), family="sd3")


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = save_tiny_sd3(tmp_path_factory.mktemp("sd3_without_t5"), with_t5=False)
    return ModelConfig(pretrained=str(folder), family="sd3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["model", "without_t5"])
def test_prompts_are_encoded_as_by_the_pipeline(name: str, dtype: Any, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "without_t5" else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(model.pretrained, torch_dtype=dtype, **absent)
    with torch.no_grad():
        text_states, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=256
        )
    encoded = load_text(model, dtype=dtype).encode(PROMPTS)
    assert encoded.text_states.shape == (5, 16 + 256, 48)
    assert encoded.text_states.dtype == dtype
    assert torch.equal(encoded.text_states, text_states)
    assert encoded.pooled is not None
    assert torch.equal(encoded.pooled, pooled)
    assert bool((text_states[:, 16:] == 0).all()) == (name == "without_t5")


def test_a_prompt_is_cut_if_no_encoder_reads_its_end(model: ModelConfig, without_t5: ModelConfig) -> None:
    prompts = ["a red circle", LONG, "red " * 300]
    for one, expected in ((model, 1), (without_t5, 2)):
        said: list[str] = []
        text = load_text(one, dtype=torch.float32, say=said.append)
        text.encode(prompts)
        assert len(text.cut_prompts) == expected
        assert len(said) == 1
        assert f"reads {256 if one is model else 16}:" in said[0]


def given(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Latents, times and conditioning of N = 4 images."""
    generator = torch.Generator().manual_seed(3)
    conditioning = Conditioning(
        text_states=torch.randn(4, 272, 48, generator=generator), pooled=torch.randn(4, 40, generator=generator)
    )
    return (
        torch.randn(4, LATENT_CHANNELS, 8, 8, generator=generator),
        torch.tensor([1.0, 500.0, 250.0, 1000.0]),
        conditioning,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_predicts_what_diffusers_does(model: ModelConfig, dtype: torch.dtype) -> None:
    latents, times, conditioning = given()
    theirs = SD3Transformer2DModel.from_pretrained(model.pretrained, subfolder="transformer", torch_dtype=dtype)
    if dtype == torch.bfloat16:  # its layers read slices, whose strides choose kernels that round otherwise
        read_row_major(theirs)
    transformer = load_denoiser(model, dtype=dtype)
    with torch.no_grad():
        expected = theirs(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.text_states.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            timestep=times,
        ).sample
    found = predict_by_sd3_transformer(transformer, latents, times, conditioning)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_is_counted_and_recognised(shape: str) -> None:
    transformer = tiny_transformer(shape)
    config = {**transformer.config, "_class_name": "SD3Transformer2DModel"}
    expected = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    assert sd3_shapes(config) == expected
    assert family_of(config) is FAMILIES["sd3"]
    assert family_of({**config, "_class_name": "AuraFlowTransformer2DModel"}) is None
    assert sd3_shapes({**config, "qk_norm": "layer_norm"}) is None, "an unknown norm is built by diffusers alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_first_difference_is_zero_and_every_weight_learns(
    model: ModelConfig, checkpointing: bool, dtype: torch.dtype
) -> None:
    policy = load_denoiser(model, dtype=dtype)
    set_attention(policy, choose_attention(policy, "auto", device="cpu", dtype=dtype))
    reference = FrozenCopy(policy, predict=predict_by_sd3_transformer, dtype=dtype, device="cpu")
    if checkpointing:
        policy.enable_gradient_checkpointing()
    prediction = predict_by_sd3_transformer(policy, *given())
    assert torch.equal(prediction, reference.predict(*given()))
    prediction.square().mean().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_latents_are_shifted_before_they_are_scaled(model: ModelConfig) -> None:
    vae = load_vae(model)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    noise = torch.randn(2, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.std * noise - 0.0609) * 1.5305
    torch.testing.assert_close(encode_images(vae, pixels, noise), expected, rtol=1e-6, atol=1e-6)


def test_sides_are_whole_patches_with_a_position(model: ModelConfig) -> None:
    assert latent_shape(model, (32, 64)) == (LATENT_CHANNELS, 8, 16)
    with pytest.raises(ModelError, match=r"32 x 36 pixels .* not a multiple of 8, .* and patches of 2"):
        latent_shape(model, (32, 36))
    with pytest.raises(ModelError, match=r"32 x 72 pixels .* more than 64"):
        latent_shape(model, (32, 72))


def test_kinds_of_denoisers_are_told_apart(model: ModelConfig, sdxl: ModelConfig) -> None:
    for one, other, title in ((model, "sdxl", "transformer"), (sdxl, "sd3", "UNet")):
        with pytest.raises(ModelError, match=rf"family {other}, but .* has a {title} of family {one.family}; set"):
            open_pipeline(one.model_copy(update={"family": other}))


def test_xformers_is_refused(model: ModelConfig) -> None:
    policy = load_denoiser(model, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"model\.attention xformers: a SD3Transformer2DModel has joint attention"):
        choose_attention(policy, "xformers", device="cpu", dtype=torch.float32)


def test_shards_and_another_start_give_the_same_weights(model: ModelConfig, tmp_path: Path) -> None:
    """The table of positions belongs to the pipeline where other weights lack it, as those of a checkpoint do."""
    whole = load_denoiser(model, dtype=torch.float32)
    shutil.copytree(model.pretrained, tmp_path / "sharded", ignore=shutil.ignore_patterns("transformer"))
    whole.save_pretrained(tmp_path / "sharded" / "transformer", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded/transformer").glob("*.safetensors"))) > 2
    sharded = load_denoiser(model.model_copy(update={"pretrained": str(tmp_path / "sharded")}), dtype=torch.float32)
    trained = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    started = load_denoiser(model, dtype=torch.float32, start=trained)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, sharded.state_dict()[name]), name
        assert torch.equal(tensor, started.state_dict()[name]), name
    assert "pos_embed.pos_embed" in whole.state_dict()
    other = model.model_copy(update={"policy_init": str(tmp_path / "sharded")})
    start = open_policy_start(other, whole, has_adapter=False)
    assert start is not None
    assert all(torch.equal(start[name], tensor) for name, tensor in trained.items())
    assert "loading the transformer of" in describe_loading(model, dtype=torch.float32, with_encoders=True)
