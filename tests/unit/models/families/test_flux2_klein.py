"""FLUX.2-klein against diffusers' own pipeline, transformer and VAE, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from tiny_flux2 import LATENT_CHANNELS, save_tiny_flux2, tiny_transformer
from torch import Tensor

from ds_dpo.batch import Conditioning
from ds_dpo.config.models import ModelConfig
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.errors import ModelError
from ds_dpo.evaluation.drawing.live_pipeline import build_pipeline
from ds_dpo.evaluation.drawing.sampling import draw_images
from ds_dpo.models.denoiser.adapters import add_adapter
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.denoiser.predict import predict_by_flux2_transformer
from ds_dpo.models.families.table import FAMILIES, family_of
from ds_dpo.models.layout import read_row_major
from ds_dpo.models.loading import drawing_scheduler, latent_shape, load_denoiser, load_text, load_vae
from ds_dpo.models.pipelines.latent_scaling import latent_scaling
from ds_dpo.models.pipelines.pretrained import open_vae
from ds_dpo.models.reference import FrozenCopy, PolicyWithoutAdapter
from ds_dpo.models.vae import decode_latents, encode_images, encode_moments, sample_latents
from ds_dpo.models.weights.flux2_shapes import flux2_shapes

PROMPTS = ["a red circle on a white background", "", "a blue square", "a red circle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = save_tiny_flux2(tmp_path_factory.mktemp("flux2") / "base")
    return ModelConfig(pretrained=str(folder), family="flux2_klein")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_encoded_as_by_the_pipeline(model: ModelConfig, dtype: torch.dtype) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(model.pretrained, torch_dtype=dtype)
    with torch.no_grad():
        text_states, _ = pipeline.encode_prompt(PROMPTS, device="cpu")
    said: list[str] = []
    text = load_text(model, dtype=dtype, say=said.append)
    encoded = text.encode(PROMPTS)
    assert encoded.text_states.shape == (4, FAMILIES["flux2_klein"].text_tokens, 48)
    assert encoded.text_states.dtype == dtype
    assert torch.equal(encoded.text_states, text_states)
    assert encoded.pooled is None
    assert not said
    # the chat around a prompt takes a part of the 512 tokens
    (tower,) = text.towers
    assert tower.frame is not None
    around = len(tower.tokenizer(tower.frame.around("")).input_ids)
    assert 0 < around == 512 - tower.prompt_tokens
    text.encode(["q " * (tower.prompt_tokens + 1)])
    assert f"reads {tower.prompt_tokens}:" in said[0]


def given() -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, times and conditioning of N = 4 images of unequal sides."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(4, LATENT_CHANNELS, 8, 4, generator=generator)
    text_states = torch.randn(4, 12, 48, generator=generator)
    return latents, torch.tensor([1.0, 500.0, 250.0, 1000.0]), Conditioning(text_states=text_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_predicts_what_diffusers_does(model: ModelConfig, dtype: torch.dtype) -> None:
    latents, times, conditioning = given()
    theirs = Flux2Transformer2DModel.from_pretrained(model.pretrained, subfolder="transformer", torch_dtype=dtype)
    if dtype == torch.bfloat16:  # its layers read slices, whose strides choose kernels that round otherwise
        read_row_major(theirs)
    transformer = load_denoiser(model, dtype=dtype)
    patches = Flux2KleinPipeline._patchify_latents(latents.to(dtype))
    with torch.no_grad():
        tokens = theirs(
            hidden_states=Flux2KleinPipeline._pack_latents(patches),
            encoder_hidden_states=conditioning.text_states.to(dtype),
            timestep=times / 1000,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(patches),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(conditioning.text_states),
        ).sample
    expected = Flux2KleinPipeline._unpatchify_latents(tokens.transpose(1, 2).unflatten(2, (4, 2)))
    found = predict_by_flux2_transformer(transformer, latents, times, conditioning)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_latents_are_normed_by_patches_as_in_the_pipeline(model: ModelConfig) -> None:
    vae: Any = load_vae(model)
    pipeline: Any = Flux2KleinPipeline.from_pretrained(model.pretrained)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        expected = pipeline._unpatchify_latents(pipeline._encode_vae_image(pixels, generator=None))
        posterior = pipeline.vae.encode(pixels).latent_dist
    found = encode_images(vae, pixels, torch.zeros(2, LATENT_CHANNELS, 8, 8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # as a cache has it, whose scaling comes from the files alone
    scaling = latent_scaling(open_vae(model))
    assert torch.equal(sample_latents(encode_moments(vae, pixels), torch.zeros_like(found), vae_config=scaling), found)
    with torch.no_grad():
        images = (pipeline.vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode_latents(vae, found), images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_latents(vae, posterior.mean, are_scaled=False), images, rtol=1e-6, atol=1e-6)


def test_shapes_are_counted_and_klein_is_told_from_dev() -> None:
    for guided in (False, True):
        transformer = tiny_transformer(guidance_embeds=guided, mlp_ratio=2.5)
        config = {**transformer.config, "_class_name": "Flux2Transformer2DModel"}
        expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
        assert flux2_shapes(config) == expected
        assert family_of(config) is (None if guided else FAMILIES["flux2_klein"])
    assert flux2_shapes({**config, "unheard_of": 1}) is None, "diffusers alone builds it"
    published = {"joint_attention_dim": 7680, "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20}
    shapes = flux2_shapes({**published, "guidance_embeds": False})
    assert shapes is not None
    assert sum(map(math.prod, shapes.values())) == pytest.approx(3.88e9, rel=2e-3), "klein's 4B"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_first_difference_is_zero_and_every_weight_learns(
    model: ModelConfig, checkpointing: bool, dtype: torch.dtype
) -> None:
    policy = load_denoiser(model, dtype=dtype)
    set_attention(policy, choose_attention(policy, "auto", device="cpu", dtype=dtype))
    reference = FrozenCopy(policy, predict=predict_by_flux2_transformer, dtype=dtype, device="cpu")
    if checkpointing:
        policy.enable_gradient_checkpointing()
    prediction = predict_by_flux2_transformer(policy, *given())
    assert torch.equal(prediction, reference.predict(*given()))
    prediction.square().mean().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("target", "double", "single"), [("attention", 8, 2), ("attention+mlp", 12, 2), ("all", 12, 2)]
)
def test_named_targets_are_the_layers_of_both_kinds_of_blocks(
    model: ModelConfig, target: str, double: int, single: int
) -> None:
    policy = load_denoiser(model, dtype=torch.float32)
    add_adapter(policy, AdapterConfig(type="lora", rank=2, targets=[target]), seed=0)
    layers = {name.partition(".lora_A")[0] for name, _ in policy.named_parameters() if ".lora_A." in name}
    for kind, number in (("transformer_blocks", double), ("single_transformer_blocks", single)):
        assert len({name for name in layers if name.startswith(f"{kind}.1.")}) == number, kind
    without = PolicyWithoutAdapter(policy, predict=predict_by_flux2_transformer).predict(*given())
    assert torch.equal(without, predict_by_flux2_transformer(policy, *given())), "a new adapter changes nothing"


def test_images_are_drawn_as_by_its_pipeline(model: ModelConfig) -> None:
    theirs: Any = Flux2KleinPipeline.from_pretrained(model.pretrained)
    ours = build_pipeline(
        denoiser=theirs.transformer,
        vae=load_vae(model),
        tokenizers=[theirs.tokenizer],
        text_encoders=[theirs.text_encoder],
        scheduler=drawing_scheduler(model),
    )
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    found = draw_images(ours, PROMPTS[:1], [4], resolution=32, **settings)
    noise = torch.randn(LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(4))[None]
    expected = theirs(
        prompt=PROMPTS[0],
        latents=theirs._patchify_latents(noise),
        height=32,
        width=32,
        output_type="pt",
        **settings,
    ).images
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sides_and_other_models_are_refused(model: ModelConfig) -> None:
    assert latent_shape(model, (32, 64)) == (LATENT_CHANNELS, 8, 16)
    with pytest.raises(ModelError, match=r"32 x 36 pixels .* not a multiple of 8, .* and patches of 2"):
        latent_shape(model, (32, 36))
    policy = load_denoiser(model, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"model\.attention xformers: a Flux2Transformer2DModel has joint attention"):
        choose_attention(policy, "xformers", device="cpu", dtype=torch.float32)
