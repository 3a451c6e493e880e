"""FLUX.1 against diffusers' own pipeline and transformer, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from tiny_flux1 import SCALE, SHAPES, SHIFT, save_tiny_flux1, tiny_transformer
from tiny_sd3 import LATENT_CHANNELS
from torch import Tensor

from ds_dpo.batch import Conditioning
from ds_dpo.config.load import load_config
from ds_dpo.config.models import ModelConfig
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.diffusion.flow import Flow
from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.evaluation.drawing.live_pipeline import build_pipeline
from ds_dpo.evaluation.drawing.sampling import draw_images
from ds_dpo.models.conditioning import describe_guidance, extras_of, guidance_of
from ds_dpo.models.denoiser.adapters import add_adapter
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.denoiser.packing import Packing
from ds_dpo.models.denoiser.predict import predict_by_flux_transformer
from ds_dpo.models.families.table import FAMILIES, family_of
from ds_dpo.models.flow_scheduler import flow_of
from ds_dpo.models.layout import read_row_major
from ds_dpo.models.loading import (
    drawing_scheduler,
    latent_shape,
    load_denoiser,
    load_text,
    load_vae,
    scheduler_config,
)
from ds_dpo.models.reference import FrozenCopy, PolicyWithoutAdapter
from ds_dpo.models.vae import decode_latents, encode_images
from ds_dpo.models.weights.flux1_shapes import flux1_shapes

LONG = "a red circle on a blue background " * 4  # more than the 16 tokens of CLIP, fewer than the 512 of T5
PROMPTS = ["a red circle on a white background", "", LONG, "an aardvark, surely", "日本"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("flux1")
    return {
        shape: ModelConfig(pretrained=str(save_tiny_flux1(folder / shape, shape)), family="flux1") for shape in SHAPES
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_encoded_as_by_the_pipeline(models: dict[str, ModelConfig], dtype: torch.dtype) -> None:
    pipeline = FluxPipeline.from_pretrained(models["dev"].pretrained, torch_dtype=dtype)
    with torch.no_grad():
        text_states, pooled, _ = pipeline.encode_prompt(PROMPTS, None, device="cpu")
    said: list[str] = []
    text = load_text(models["dev"], dtype=dtype, say=said.append)
    encoded = text.encode(PROMPTS)
    assert encoded.text_states.shape == (5, FAMILIES["flux1"].text_tokens, 48)
    assert encoded.text_states.dtype == dtype
    assert torch.equal(encoded.text_states, text_states)
    assert encoded.pooled is not None
    assert torch.equal(encoded.pooled, pooled)
    assert len(text.cut_prompts) == 0, "T5 reads what CLIP does not"
    text.encode(["red " * 600])
    assert len(text.cut_prompts) == len(said) == 1


def given(guidance: float | None = 1.0) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, times and conditioning of N = 4 images of unequal sides."""
    generator = torch.Generator().manual_seed(3)
    conditioning = Conditioning(
        text_states=torch.randn(4, 12, 48, generator=generator),
        pooled=torch.randn(4, 16, generator=generator),
        extras={} if guidance is None else {"guidance": torch.full((4,), guidance)},
    )
    latents = torch.randn(4, LATENT_CHANNELS, 8, 4, generator=generator)
    return latents, torch.tensor([1.0, 500.0, 250.0, 1000.0]), conditioning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "guidance"), [("dev", 3.5), ("schnell", None)])
def test_it_predicts_what_diffusers_does(
    models: dict[str, ModelConfig], shape: str, guidance: float | None, dtype: torch.dtype
) -> None:
    latents, times, conditioning = given(guidance)
    theirs = FluxTransformer2DModel.from_pretrained(
        models[shape].pretrained, subfolder="transformer", torch_dtype=dtype
    )
    if dtype == torch.bfloat16:  # its layers read slices, whose strides choose kernels that round otherwise
        read_row_major(theirs)
    transformer = load_denoiser(models[shape], dtype=dtype)
    assert conditioning.pooled is not None
    with torch.no_grad():
        packed = theirs(
            hidden_states=FluxPipeline._pack_latents(latents.to(dtype), 4, LATENT_CHANNELS, 8, 4),
            encoder_hidden_states=conditioning.text_states.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            timestep=times / 1000,
            guidance=None if guidance is None else torch.full((4,), guidance),
            img_ids=FluxPipeline._prepare_latent_image_ids(4, 4, 2, "cpu", torch.float32),
            txt_ids=torch.zeros(12, 3),
        ).sample
        expected = FluxPipeline._unpack_latents(packed, 32, 16, 4)  # a VAE of factor 4
    found = predict_by_flux_transformer(transformer, latents, times, conditioning)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_a_token_is_a_patch_and_comes_back() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = Packing(side=2).pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[1, 4].tolist() == latents[1, :, 2:4, 2:4].flatten().tolist()  # second row, second column
    assert torch.equal(Packing(side=2).unpack(tokens, height=4, width=6), latents)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_is_counted_and_recognised(shape: str) -> None:
    transformer = tiny_transformer(shape)
    config = {**transformer.config, "_class_name": "FluxTransformer2DModel"}
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert flux1_shapes(config) == expected
    assert family_of(config) is FAMILIES["flux1"]
    assert flux1_shapes({**config, "unheard_of": 1}) is None, "diffusers alone builds it"


def test_guidance_is_one_value_of_all_images_where_the_transformer_takes_it(models: dict[str, ModelConfig]) -> None:
    dev, schnell = models["dev"], models["schnell"]
    chosen = dev.model_copy(update={"guidance": 3.5})
    assert [guidance_of(model) for model in (dev, chosen, schnell)] == [1.0, 3.5, None]
    assert extras_of(chosen)(torch.zeros(6, 6))["guidance"].tolist() == 6 * [3.5]
    assert extras_of(schnell)(torch.zeros(6, 6)) == {}
    assert describe_guidance(schnell) == []
    assert "given 3.5 for chosen and rejected alike (model.guidance)" in describe_guidance(chosen)[0]
    with pytest.raises(ModelError, match=r"model\.guidance 2, but the transformer of .*schnell takes no scale"):
        guidance_of(schnell.model_copy(update={"guidance": 2.0}))
    with pytest.raises(ConfigError, match=r"model\.guidance 2 with model\.family sdxl: .* as those of flux1 may"):
        load_config(["--config", "miniature", "--model.guidance", "2"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_first_difference_is_zero_and_every_weight_learns(
    models: dict[str, ModelConfig], checkpointing: bool, dtype: torch.dtype
) -> None:
    policy = load_denoiser(models["dev"], dtype=dtype)
    set_attention(policy, choose_attention(policy, "auto", device="cpu", dtype=dtype))
    reference = FrozenCopy(policy, predict=predict_by_flux_transformer, dtype=dtype, device="cpu")
    if checkpointing:
        policy.enable_gradient_checkpointing()
    prediction = predict_by_flux_transformer(policy, *given())
    assert torch.equal(prediction, reference.predict(*given()))
    assert not torch.equal(prediction, reference.predict(*given(2.0))), "guidance conditions it"
    prediction.square().mean().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("target", "double", "single"), [("attention", 8, 3), ("attention+mlp", 12, 5), ("all", 14, 6)]
)
def test_named_targets_are_the_layers_of_both_kinds_of_blocks(
    models: dict[str, ModelConfig], target: str, double: int, single: int
) -> None:
    policy = load_denoiser(models["dev"], dtype=torch.float32)
    add_adapter(policy, AdapterConfig(type="lora", rank=2, targets=[target]), seed=0)
    layers = {name.partition(".lora_A")[0] for name, _ in policy.named_parameters() if ".lora_A." in name}
    for kind, number in (("transformer_blocks", double), ("single_transformer_blocks", single)):
        assert len({name for name in layers if name.startswith(f"{kind}.1.")}) == number, kind
    outside = {name for name in layers if "transformer_blocks" not in name}
    assert len(outside) == (10 if target == "all" else 0)
    without = PolicyWithoutAdapter(policy, predict=predict_by_flux_transformer).predict(*given())
    assert torch.equal(without, predict_by_flux_transformer(policy, *given())), "a new adapter changes nothing"


def test_latents_are_shifted_before_they_are_scaled(models: dict[str, ModelConfig]) -> None:
    vae = load_vae(models["dev"])
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    noise = torch.randn(2, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.std * noise - SHIFT) * SCALE
    torch.testing.assert_close(encode_images(vae, pixels, noise), expected, rtol=1e-6, atol=1e-6)


def test_sides_are_whole_patches(models: dict[str, ModelConfig]) -> None:
    assert latent_shape(models["dev"], (32, 64)) == (LATENT_CHANNELS, 8, 16)
    with pytest.raises(ModelError, match=r"32 x 36 pixels .* not a multiple of 8, .* and patches of 2"):
        latent_shape(models["dev"], (32, 36))


def test_times_are_shifted_by_the_number_of_tokens(models: dict[str, ModelConfig]) -> None:
    """dev at 1024 pixels: 64 x 64 tokens, mu 1.15; schnell never."""
    dev, schnell = (flow_of(scheduler_config(models[shape]), name=shape) for shape in SHAPES)
    assert dev.shift.factor_at((LATENT_CHANNELS, 128, 128)) == pytest.approx(torch.tensor(1.15).exp().item())
    assert dev.shift.factor_at((LATENT_CHANNELS, 32, 32)) == pytest.approx(torch.tensor(0.5).exp().item())
    assert schnell.shift.factor_at((LATENT_CHANNELS, 128, 128)) == 1
    assert isinstance(dev, Flow)


def test_images_are_drawn_as_by_its_pipeline(models: dict[str, ModelConfig]) -> None:
    theirs: Any = FluxPipeline.from_pretrained(models["dev"].pretrained)
    ours = build_pipeline(
        denoiser=theirs.transformer,
        vae=theirs.vae,
        tokenizers=[theirs.tokenizer, theirs.tokenizer_2],
        text_encoders=[theirs.text_encoder, theirs.text_encoder_2],
        scheduler=drawing_scheduler(models["dev"]),
    )
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    found = draw_images(ours, PROMPTS[:1], [4], resolution=32, **settings)
    noise = torch.randn(LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(4))[None]
    latents = theirs(
        PROMPTS[0],
        latents=FluxPipeline._pack_latents(noise, 1, LATENT_CHANNELS, 8, 8),
        height=32,
        width=32,
        output_type="latent",
        **settings,
    ).images
    expected = decode_latents(theirs.vae, FluxPipeline._unpack_latents(latents, 32, 32, 4))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"resolution 36: must be a multiple of 8 and of the VAE's 4 times 2"):
        draw_images(ours, PROMPTS[:1], [4], resolution=36, **settings)


def test_whatever_takes_other_channels_is_refused(models: dict[str, ModelConfig], tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(models["dev"].pretrained)
    pipeline.transformer = tiny_transformer(in_channels=80, out_channels=64)  # as FLUX.1-Fill has 384
    pipeline.save_pretrained(tmp_path / "fill")
    model = models["dev"].model_copy(update={"pretrained": str(tmp_path / "fill")})
    with pytest.raises(ModelError, match="80 input and 64 output channels; only text-to-image"):
        load_denoiser(model, dtype=torch.float32)
