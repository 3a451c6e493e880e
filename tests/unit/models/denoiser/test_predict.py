from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning
from ds_dpo.config.models import ModelConfig
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.loading import load_denoiser

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TIMESTEPS = torch.tensor([10, 900])


def sdxl_conditioning(*, side: int = 1024) -> Conditioning:
    generator = torch.Generator().manual_seed(2)
    return Conditioning(
        text_states=torch.randn(2, 16, 96, generator=generator),
        pooled=torch.randn(2, 48, generator=generator),
        extras={"time_ids": torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=torch.float32)},
    )


class Recorder(nn.Module):
    """Stands for a UNet and keeps what it was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.given: dict[str, Any] = {}

    def forward(self, sample: Tensor, timesteps: Tensor, **given: Any) -> tuple[Tensor]:
        self.given = {"sample": sample, "timesteps": timesteps, **given}
        return (sample,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sdxl_prediction_is_the_unets_own_in_its_dtype(sdxl: ModelConfig, dtype: torch.dtype) -> None:
    unet = load_denoiser(sdxl, dtype=dtype)
    conditioning = sdxl_conditioning()
    prediction = predict_by_unet(unet, LATENTS, TIMESTEPS, conditioning)
    assert conditioning.pooled is not None
    expected = unet(
        LATENTS.to(dtype),
        TIMESTEPS,
        conditioning.text_states.to(dtype),
        added_cond_kwargs={"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.extras["time_ids"]},
    ).sample
    assert prediction.dtype == dtype
    assert torch.equal(prediction, expected)


def test_sd15_prediction_has_no_added_conditioning(sd15: ModelConfig) -> None:
    unet = load_denoiser(sd15, dtype=torch.float32)
    text_states = torch.randn(2, 16, 48)
    prediction = predict_by_unet(unet, LATENTS, TIMESTEPS, Conditioning(text_states=text_states))
    assert torch.equal(prediction, unet(LATENTS, TIMESTEPS, text_states).sample)


def test_inputs_are_cast_to_the_dtype_but_sizes_and_timesteps_stay_exact() -> None:
    recorder = Recorder(torch.bfloat16)
    predict_by_unet(recorder, LATENTS, TIMESTEPS, sdxl_conditioning(side=1026))
    added = recorder.given["added_cond_kwargs"]
    assert recorder.given["sample"].dtype == torch.bfloat16
    assert recorder.given["encoder_hidden_states"].dtype == torch.bfloat16
    assert added["text_embeds"].dtype == torch.bfloat16
    assert added["time_ids"][0].tolist() == [1026, 1026, 0, 0, 1026, 1026]
    assert recorder.given["timesteps"].tolist() == [10, 900]


def test_a_bf16_unet_tells_sizes_apart_that_bf16_does_not(sdxl: ModelConfig) -> None:
    assert torch.tensor(1026.0, dtype=torch.bfloat16) == 1024
    unet = load_denoiser(sdxl, dtype=torch.bfloat16)
    one, other = (predict_by_unet(unet, LATENTS, TIMESTEPS, sdxl_conditioning(side=side)) for side in (1024, 1026))
    assert not torch.equal(one, other)


def test_gradients_reach_the_unet(sdxl: ModelConfig) -> None:
    unet = load_denoiser(sdxl, dtype=torch.float32)
    predict_by_unet(unet, LATENTS, TIMESTEPS, sdxl_conditioning()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
