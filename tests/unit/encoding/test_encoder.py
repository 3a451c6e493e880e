from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ds_dpo.batch import CachedSamples, PairSamples
from ds_dpo.config.models import ModelConfig
from ds_dpo.encoding.encoder import CachedEncoder, OnlineEncoder
from ds_dpo.errors import DataError
from ds_dpo.models import vae as models_vae
from ds_dpo.models.families import text as families_text
from ds_dpo.models.families.family import no_extras
from ds_dpo.models.families.sdxl import refiner_extras, sdxl_extras
from ds_dpo.models.families.text import TextEncoder, encode_sd15, encode_sdxl
from ds_dpo.models.loading import load_text, load_vae

# B = 3 pairs, N = 6 images
PROMPTS = ["a red circle", "", "a blue square"]


@pytest.fixture
def vae() -> AutoencoderKL:
    return load_vae(ModelConfig(pretrained="ds_dpo://assets/miniature/model"))


@pytest.fixture
def text() -> TextEncoder:
    return load_text(ModelConfig(pretrained="ds_dpo://assets/miniature/model"), dtype=torch.bfloat16)


@pytest.fixture
def samples() -> PairSamples:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return PairSamples(
        chosen_pixels=normal(3, 3, 32, 32).clamp(-1, 1),
        rejected_pixels=normal(3, 3, 32, 32).clamp(-1, 1),
        prompts=PROMPTS,
        chosen_time_ids=torch.arange(18.0).view(3, 6),
        rejected_time_ids=torch.arange(18.0).view(3, 6) + 100,
        timesteps=torch.tensor([1, 500, 999]),
        noise=normal(3, 4, 8, 8),
        chosen_posterior_noise=normal(3, 4, 8, 8),
        rejected_posterior_noise=normal(3, 4, 8, 8),
        pair_ids=torch.tensor([11, 12, -13]),
        target_probabilities=torch.tensor([1.0, 0.5, 0.75]),
        weights=torch.tensor([1.0, 2.0, 3.0]),
    )


def test_all_chosen_images_then_all_rejected_are_encoded_with_their_own_draws(
    vae: AutoencoderKL, text: TextEncoder, samples: PairSamples
) -> None:
    batch = OnlineEncoder(vae=vae, text=text, extras=sdxl_extras, device="cpu")(samples)
    with torch.no_grad():
        for pair in range(3):
            for image, pixels, noise in (
                (pair, samples.chosen_pixels, samples.chosen_posterior_noise),
                (3 + pair, samples.rejected_pixels, samples.rejected_posterior_noise),
            ):
                posterior = vae.encode(pixels[pair : pair + 1]).latent_dist
                expected = (posterior.mean + posterior.std * noise[pair]) * vae.config["scaling_factor"]
                torch.testing.assert_close(batch.latents[image], expected[0], rtol=1e-4, atol=1e-5)
    assert batch.latents.dtype == torch.float32


def test_what_the_loader_drew_passes_through_unchanged(
    vae: AutoencoderKL, text: TextEncoder, samples: PairSamples
) -> None:
    batch = OnlineEncoder(vae=vae, text=text, extras=sdxl_extras, device="cpu")(samples)
    assert torch.equal(batch.noise, samples.noise)
    assert batch.timesteps.tolist() == [1, 500, 999]
    assert batch.pair_ids.tolist() == [11, 12, -13]
    assert batch.target_probabilities.tolist() == [1, 0.5, 0.75]
    assert batch.weights.tolist() == [1, 2, 3]
    assert torch.equal(batch.extras["time_ids"][:3], samples.chosen_time_ids)
    assert torch.equal(batch.extras["time_ids"][3:], samples.rejected_time_ids)
    assert batch.extras["time_ids"].dtype == torch.float32


def test_prompts_are_encoded_once_for_each_pair_without_a_gradient(
    vae: AutoencoderKL, text: TextEncoder, samples: PairSamples
) -> None:
    batch = OnlineEncoder(vae=vae, text=text, extras=sdxl_extras, device="cpu")(samples)
    expected = text.encode(PROMPTS)
    assert expected.pooled is not None
    assert batch.pooled is not None
    assert torch.equal(batch.text_states, expected.text_states)
    assert torch.equal(batch.pooled, expected.pooled)
    assert batch.text_states.shape == (3, 16, 96)
    assert batch.text_states.dtype == torch.bfloat16
    assert not any(tensor.requires_grad for tensor in (batch.latents, batch.text_states, batch.pooled))


def test_a_family_without_sizes_is_told_none(vae: AutoencoderKL, text: TextEncoder, samples: PairSamples) -> None:
    batch = OnlineEncoder(
        vae=vae, text=TextEncoder(text.towers[:1], encode=encode_sd15), extras=no_extras, device="cpu"
    )(samples)
    assert batch.pooled is None
    assert batch.extras == {}
    assert batch.text_states.shape == (3, 16, 48)


def test_the_refiner_is_told_original_size_crop_and_aesthetics(
    vae: AutoencoderKL, text: TextEncoder, samples: PairSamples
) -> None:
    samples.chosen_time_ids[:] = torch.tensor([600.0, 800.0, 3.0, 7.0, 512.0, 512.0])
    samples.rejected_time_ids[:] = torch.tensor([900.0, 640.0, 0.0, 5.0, 512.0, 512.0])
    second = TextEncoder(text.towers[1:], encode=encode_sdxl)
    batch = OnlineEncoder(vae=vae, text=second, extras=refiner_extras, device="cpu")(samples)
    assert batch.extras["time_ids"].tolist() == [[600, 800, 3, 7, 6]] * 3 + [[900, 640, 0, 5, 6]] * 3
    assert batch.text_states.shape == (3, 16, 48)
    assert batch.pooled is not None
    assert batch.pooled.shape == (3, 48)


@pytest.mark.parametrize("bad", ["chosen_pixels", "rejected_pixels"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_name_their_pairs(
    vae: AutoencoderKL, text: TextEncoder, samples: PairSamples, bad: str, value: float
) -> None:
    for pair in (0, 2):
        getattr(samples, bad)[pair, 0, 5, 5] = value
    with pytest.raises(DataError, match=r"for pairs 11, -13 in torch.float32; .*madebyollin/sdxl-vae-fp16-fix"):
        OnlineEncoder(vae=vae, text=text, extras=sdxl_extras, device="cpu")(samples)


def cached_samples(samples: PairSamples, *, moments: list[Tensor], pooled: Tensor | None) -> CachedSamples:
    chosen, rejected = moments
    return CachedSamples(
        chosen_moments=chosen,
        rejected_moments=rejected,
        text_states=torch.ones(3, 2, 5),
        pooled=pooled,
        chosen_time_ids=samples.chosen_time_ids,
        rejected_time_ids=samples.rejected_time_ids,
        timesteps=samples.timesteps,
        noise=samples.noise,
        chosen_posterior_noise=samples.chosen_posterior_noise,
        rejected_posterior_noise=samples.rejected_posterior_noise,
        pair_ids=samples.pair_ids,
        target_probabilities=samples.target_probabilities,
        weights=samples.weights,
    )


def test_latents_are_drawn_from_kept_moments_shifted_and_scaled(samples: PairSamples) -> None:
    mean, logvar = torch.full((3, 4, 8, 8), 2.0), torch.full((3, 4, 8, 8), 2 * torch.log(torch.tensor(3.0)))
    moments = [torch.cat([mean, logvar], dim=1), torch.cat([-mean, logvar], dim=1)]
    settings = {"scaling_factor": 0.5, "shift_factor": 0.25}
    encode = CachedEncoder(
        quantity="moments", vae_dtype=torch.float32, vae_config=settings, extras=sdxl_extras, device="cpu"
    )
    batch = encode(cached_samples(samples, moments=moments, pooled=torch.ones(3, 7)))
    torch.testing.assert_close(batch.latents[:3], (2 + 3 * samples.chosen_posterior_noise - 0.25) * 0.5)
    torch.testing.assert_close(batch.latents[3:], (-2 + 3 * samples.rejected_posterior_noise - 0.25) * 0.5)
    assert torch.equal(batch.extras["time_ids"], torch.cat([samples.chosen_time_ids, samples.rejected_time_ids]))
    for name in ("noise", "timesteps", "pair_ids", "target_probabilities", "weights"):
        assert torch.equal(getattr(batch, name), getattr(samples, name))


def test_a_kept_mean_is_a_latent_without_a_draw_and_sd15_is_told_no_sizes(samples: PairSamples) -> None:
    mean = torch.full((3, 4, 8, 8), 2.0, dtype=torch.float16)
    encode = CachedEncoder(
        quantity="mean", vae_dtype=torch.float32, vae_config={"scaling_factor": 0.5}, extras=no_extras, device="cpu"
    )
    batch = encode(cached_samples(samples, moments=[mean, 2 * mean], pooled=None))
    assert torch.equal(batch.latents[:3], torch.ones(3, 4, 8, 8))
    assert torch.equal(batch.latents[3:], torch.full((3, 4, 8, 8), 2.0))
    assert batch.pooled is None
    assert batch.extras == {}


def test_encoding_waits_for_the_device_once(
    vae: AutoencoderKL, text: TextEncoder, samples: PairSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads whether latents are finite. All that it sends goes without a wait; constants were sent before."""
    encode = OnlineEncoder(vae=vae, text=text, extras=sdxl_extras, device="cpu")
    encode(samples)
    calls: list[str] = []
    send, cpu, to = families_text._sent, Tensor.cpu, PairSamples.to

    def moved(pairs: PairSamples, device: str, *, non_blocking: bool = False) -> PairSamples:
        calls.append("pairs without a wait" if non_blocking else "pairs")
        return to(pairs, device, non_blocking=non_blocking)

    def noting(name: str, original: Any) -> Any:
        return lambda *given, **options: (calls.append(name), original(*given, **options))[1]

    monkeypatch.setattr(PairSamples, "to", moved)
    monkeypatch.setattr(families_text, "_sent", noting("prompts", send))
    monkeypatch.setattr(Tensor, "cpu", noting("read", cpu))
    constants_sent = models_vae._channels.cache_info().misses
    encode(samples)
    assert models_vae._channels.cache_info().misses == constants_sent > 0
    assert calls == ["pairs without a wait", "read", "prompts", "prompts"]
