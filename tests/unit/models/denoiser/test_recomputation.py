"""Exactly the named blocks run twice in a step, in every class of denoiser, and no gradient changes by a bit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny_flux1
import tiny_flux2
import tiny_sd3
import torch
from tiny_families import tiny_model
from torch import Tensor, nn

from ds_dpo.batch import Conditioning
from ds_dpo.models.conditioning import takes_guidance, with_guidance
from ds_dpo.models.denoiser.recomputation import call_blocks_by, recompute_all, recompute_blocks
from ds_dpo.models.families.table import FAMILIES

DENOISERS: dict[str, Callable[[], Any]] = {
    "sdxl": lambda: tiny_model("sdxl").modules["unet"],
    "sd15": lambda: tiny_model("sd15").modules["unet"],
    "sd3": lambda: tiny_sd3.tiny_transformer(pos_embed_max_size=16),
    "flux1": tiny_flux1.tiny_transformer,
    "flux2_klein": tiny_flux2.tiny_transformer,
}
# blocks in forward order: a UNet's resnets and transformer blocks, except the first resnet in its middle
BLOCKS = {"sdxl": 33, "sd15": 37, "sd3": 3, "flux1": 4, "flux2_klein": 4}


def gradients(family: str, denoiser: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Return the prediction for one image of a fixed seed, and the gradients of its mean square."""
    row, draw = FAMILIES[family], torch.Generator().manual_seed(1)
    settings = denoiser.config
    channels = row.denoiser.packing.latent_channels(settings)
    width = settings.get("joint_attention_dim") or settings["cross_attention_dim"]
    pooled = settings.get("pooled_projection_dim") or (64 if family == "sdxl" else None)
    conditioning = Conditioning(
        text_states=torch.randn(1, 7, width, generator=draw),
        pooled=None if pooled is None else torch.randn(1, pooled, generator=draw),
        extras=with_guidance(row.extras, 1.0 if takes_guidance(settings) else None)(torch.full((1, 6), 64.0)),
    )
    denoiser.zero_grad()
    found = row.denoiser.predict(
        denoiser, torch.randn(1, channels, 16, 16, generator=draw), torch.tensor([300]), conditioning
    )
    found.square().mean().backward()
    return found, [parameter.grad for parameter in denoiser.parameters()]


def block_names(family: str, denoiser: Any) -> list[str]:
    """Return the blocks in the order in which the denoiser calls them."""
    names = {module: name for name, module in denoiser.named_modules()}
    called: list[str] = []

    def call(block: nn.Module, *inputs: Any) -> Any:
        called.append(names[block])
        return block(*inputs)

    call_blocks_by(denoiser, call)
    gradients(family, denoiser)
    denoiser.disable_gradient_checkpointing()
    return called


def forwards(family: str, denoiser: Any, names: list[str]) -> Counter[str]:
    """Return how many times each block's forward pass begins in a step."""
    counts: Counter[str] = Counter()
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
        for name in names
    ]
    gradients(family, denoiser)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("family", DENOISERS)
def test_the_named_blocks_alone_run_twice(family: str) -> None:
    denoiser = DENOISERS[family]().train()
    names = block_names(family, denoiser)
    assert len(names) == len(set(names)) == BLOCKS[family]
    plain = gradients(family, denoiser)
    assert set(forwards(family, denoiser, names).values()) == {1}
    chosen = names[::2]
    some, everything = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    recompute_blocks(some, chosen)
    recompute_all(everything)
    copied = copy.deepcopy(some)  # a copy has the same choice
    for recomputing, again in ((some, chosen), (copied, chosen), (everything, names)):
        assert forwards(family, recomputing, names) == {name: 1 + (name in again) for name in names}
        prediction, found = gradients(family, recomputing)
        assert torch.equal(prediction, plain[0])
        for one, expected in zip(found, plain[1], strict=True):
            assert (one is None) == (expected is None)
            assert one is None or expected is None or torch.equal(one, expected)
    with torch.no_grad():
        assert some.is_gradient_checkpointing
    some.disable_gradient_checkpointing()
    assert set(forwards(family, some, names).values()) == {1}
