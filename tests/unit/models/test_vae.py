from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from ds_dpo.config.models import ModelConfig
from ds_dpo.miniature.models import make_vae
from ds_dpo.models import vae as vae_module
from ds_dpo.models.loading import load_vae
from ds_dpo.models.vae import decode_latents, encode_images, encode_moments, sample_latents

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def vae(sdxl: ModelConfig) -> AutoencoderKL:
    return load_vae(sdxl)


def test_latents_are_the_posteriors_sample_for_that_noise_scaled(vae: AutoencoderKL) -> None:
    posterior = vae.encode(PIXELS).latent_dist
    # latent_dist draws the same noise from the same generator
    expected = posterior.sample(torch.Generator().manual_seed(2)) * vae.config["scaling_factor"]
    latents = encode_images(vae, PIXELS, NOISE)
    assert torch.equal(latents, expected)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


def test_a_half_precision_vae_gives_fp32_latents_near_those_of_fp32(sdxl: ModelConfig, vae: AutoencoderKL) -> None:
    half = load_vae(sdxl.model_copy(update={"vae_dtype": "bf16"}))
    assert half.dtype == torch.bfloat16
    latents, expected = encode_images(half, PIXELS, NOISE), encode_images(vae, PIXELS, NOISE)
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().max() < 0.05 * expected.abs().max()


def test_large_images_pass_in_slices(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_images(vae, PIXELS, NOISE)
    batch_sizes: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda module, arguments: batch_sizes.append(len(arguments[0])))
    for pixels_at_once, sizes in ((2 * 32 * 32, [2, 1]), (32 * 32 - 1, [1, 1, 1]), (3 * 32 * 32, [3])):
        batch_sizes.clear()
        monkeypatch.setattr(vae_module, "PIXELS_AT_ONCE", pixels_at_once)
        torch.testing.assert_close(encode_images(vae, PIXELS, NOISE), whole, rtol=1e-5, atol=1e-5)
        assert batch_sizes == sizes


def test_one_image_of_1024_pixels_passes_at_a_time_and_four_of_512() -> None:
    assert vae_module.PIXELS_AT_ONCE // (1024 * 1024) == 1
    assert vae_module.PIXELS_AT_ONCE // (512 * 512) == 4


def test_images_are_decoded_as_the_pipeline_does(vae: AutoencoderKL) -> None:
    latents = encode_images(vae, PIXELS, NOISE)
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config["scaling_factor"], return_dict=False)[0]
    expected = VaeImageProcessor().postprocess(decoded, output_type="pt")
    images = decode_latents(vae, latents)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(
    ("pixels_at_once", "expected"), [(32 * 32, [1, 1, 1]), (3 * 32 * 32 - 1, [2, 1]), (1, [1, 1, 1])]
)
def test_only_so_many_images_are_decoded_at_once(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, pixels_at_once: int, expected: list[int]
) -> None:
    monkeypatch.setattr("ds_dpo.models.vae.PIXELS_AT_ONCE", pixels_at_once)
    batch_sizes: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda module, arguments: batch_sizes.append(len(arguments[0])))
    decode_latents(vae, NOISE)
    assert batch_sizes == expected


@pytest.mark.parametrize(
    ("settings", "shift", "scale"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, 0.25, 0.5),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]},
            torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1),
            torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1),
        ),
    ],
)
def test_latents_are_shifted_and_scaled_as_the_vae_states(
    settings: dict[str, object], shift: float | torch.Tensor, scale: float | torch.Tensor
) -> None:
    torch.manual_seed(0)
    vae = make_vae().eval()
    vae.register_to_config(**settings)
    with torch.no_grad():
        raw = vae.encode(PIXELS).latent_dist.sample(torch.Generator().manual_seed(2))
        decoded = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    latents = encode_images(vae, PIXELS, NOISE)
    torch.testing.assert_close(latents, (raw - shift) * scale)
    torch.testing.assert_close(decode_latents(vae, latents), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_moments_kept_exactly_give_the_same_latents_to_the_bit(sdxl: ModelConfig, dtype: str) -> None:
    vae = load_vae(sdxl.model_copy(update={"vae_dtype": dtype}))
    moments = encode_moments(vae, PIXELS)
    assert moments.shape == (3, 8, 8, 8)
    posterior = vae.encode(PIXELS.to(vae.dtype)).latent_dist
    assert torch.equal(moments[:, :4], posterior.mean)
    assert torch.equal(moments[:, 4:], posterior.logvar)
    kept = moments.float().to(vae.dtype)
    assert torch.equal(sample_latents(kept, NOISE, vae_config=vae.config), encode_images(vae, PIXELS, NOISE))


def test_means_alone_are_latents_without_a_draw(vae: AutoencoderKL) -> None:
    mean = encode_moments(vae, PIXELS)[:, :4]
    latents = sample_latents(mean, None, vae_config=vae.config)
    torch.testing.assert_close(latents, encode_images(vae, PIXELS, torch.zeros_like(NOISE)))


def test_so_many_images_pass_at_once_as_asked_for(vae: AutoencoderKL) -> None:
    batch_sizes: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda module, arguments: batch_sizes.append(len(arguments[0])))
    encode_moments(vae, PIXELS, images_at_once=2)
    assert batch_sizes == [2, 1]
