"""A DPO step of each family's own transformer, in fp64, against a plain reading of the formula, image by image.

T is 1024, so that s is exact in fp32 as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny_flux1
import tiny_flux2
import tiny_sd3
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from torch import Tensor, nn
from torch.nn.functional import softplus

from ds_dpo.batch import PreferenceBatch
from ds_dpo.diffusion.flow import Flow
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.step.preference_step import PreferenceStep

T = 1024
BETA = 50.0
GUIDANCE = 3.5
PAIRS, CHANNELS, SIDE, TOKENS = 3, 16, 4, 6
TIMESTEPS = [0, 511, 1023]


def of_sd3(transformer: Any, noisy: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    found = transformer(noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=time).sample
    assert isinstance(found, Tensor)
    return found


def of_flux1(transformer: Any, noisy: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    tokens = transformer(
        FluxPipeline._pack_latents(noisy, 1, CHANNELS, SIDE, SIDE),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time / 1000,
        guidance=torch.tensor([GUIDANCE]),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, "cpu", torch.float64),
        txt_ids=torch.zeros(TOKENS, 3),
    ).sample
    found = FluxPipeline._unpack_latents(tokens, 8 * SIDE, 8 * SIDE, 8)
    assert isinstance(found, Tensor)
    return found


def of_flux2(transformer: Any, noisy: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    patches = Flux2KleinPipeline._patchify_latents(noisy)
    tokens = transformer(
        Flux2KleinPipeline._pack_latents(patches),
        encoder_hidden_states=text,
        timestep=time / 1000,
        img_ids=Flux2KleinPipeline._prepare_latent_ids(patches),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(text),
    ).sample
    found = Flux2KleinPipeline._unpatchify_latents(tokens.transpose(1, 2).unflatten(2, (SIDE // 2, SIDE // 2)))
    assert isinstance(found, Tensor)
    return found


Call = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
# by family: its tiny transformer, its widths of text and of pooled text, diffusers' own call for one image
CASES: dict[str, tuple[Callable[[], Any], int, int, Call]] = {
    "sd3": (tiny_sd3.tiny_transformer, tiny_sd3.T5_WIDTH, sum(tiny_sd3.CLIP_WIDTHS), of_sd3),
    "flux1": (tiny_flux1.tiny_transformer, tiny_sd3.T5_WIDTH, tiny_flux1.CLIP_WIDTH, of_flux1),
    "flux2_klein": (partial(tiny_flux2.tiny_transformer, in_channels=4 * CHANNELS), 48, 1, of_flux2),
}


def random_of(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transformer_of(family: str, *, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CASES[family][0]().double()


def batch_of(family: str) -> PreferenceBatch:
    _, width, pooled, _ = CASES[family]
    batch = PreferenceBatch(
        latents=random_of(2 * PAIRS, CHANNELS, SIDE, SIDE, seed=1),
        noise=random_of(PAIRS, CHANNELS, SIDE, SIDE, seed=2),
        timesteps=torch.tensor(TIMESTEPS),
        text_states=random_of(PAIRS, TOKENS, width, seed=3),
        pooled=random_of(PAIRS, pooled, seed=4),
        pair_ids=torch.arange(PAIRS),
        target_probabilities=torch.ones(PAIRS, dtype=torch.float64),
        weights=torch.ones(PAIRS, dtype=torch.float64),
    )
    return replace(batch, extras={"guidance": torch.full((2 * PAIRS,), GUIDANCE)}) if family == "flux1" else batch


def read_plainly(batch: PreferenceBatch, policy: nn.Module, reference: nn.Module, call: Call) -> Tensor:
    """mean of log(1 + exp((beta / 2) [(m_w - r_w) - (m_l - r_l)])), with m = |v(x_s) - (e - x0)|^2 / numel."""
    assert batch.pooled is not None
    losses = []
    for pair, timestep in enumerate(TIMESTEPS):
        s, one = (timestep + 1) / T, slice(pair, pair + 1)
        noise, text, pooled = batch.noise[one], batch.text_states[one], batch.pooled[one]
        gap = torch.zeros((), dtype=torch.float64)
        for latents, sign in ((batch.latents[one], 1), (batch.latents[PAIRS + pair : PAIRS + pair + 1], -1)):
            noisy, time = (1 - s) * latents + s * noise, torch.tensor([float(timestep + 1)])
            for model, factor in ((policy, sign), (reference, -sign)):
                gap = gap + factor * ((call(model, noisy, time, text, pooled) - (noise - latents)) ** 2).mean()
        losses.append(softplus(BETA / 2 * gap))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", list(CASES))
def test_loss_and_gradient_are_those_of_the_formula(family: str) -> None:
    predict, batch = FAMILIES[family].denoiser.predict, batch_of(family)
    policy, by_hand, other = (transformer_of(family, seed=seed) for seed in (5, 5, 6))
    step = PreferenceStep(
        policy=policy,
        predict=predict,
        reference=FrozenCopy(other, predict=predict, dtype=torch.float64, device="cpu"),
        schedule=Flow(num_train_timesteps=T),
        objective=OBJECTIVES["dpo"],
        options={"beta": BETA},
    )
    loss = step(batch).loss
    loss.backward()
    expected = read_plainly(batch, by_hand, other.requires_grad_(False), CASES[family][3])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert abs(loss.item() - 0.6931) > 0.01, "policy and reference differ"
    gradients = {name: parameter.grad for name, parameter in by_hand.named_parameters()}
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-10, name
    assert max(gradient.abs().max() for gradient in gradients.values() if gradient is not None) > 1e-3
