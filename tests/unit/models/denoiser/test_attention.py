from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.attention import AttentionChoice, choose_attention, set_attention
from ds_dpo.models.loading import load_denoiser

Attend = Callable[..., Tensor]


@pytest.fixture
def unet(sdxl: ModelConfig) -> UNet2DConditionModel:
    return load_denoiser(sdxl, dtype=torch.float32)


@pytest.fixture
def install_xformers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Attend], None]:
    """Put a module in xformers' place whose memory_efficient_attention is the given function."""

    def install(attend: Attend) -> None:
        package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
        ops.memory_efficient_attention = attend  # type: ignore[attr-defined]
        package.ops = ops  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        # diffusers imports it once, when it is imported itself
        monkeypatch.setattr(attention_processor, "xformers", package)

    return install


@pytest.fixture
def no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "xformers":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])


def working(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


def choose(unet: UNet2DConditionModel, asked: str, *, dtype: torch.dtype = torch.float32) -> AttentionChoice:
    return choose_attention(unet, asked, device="cpu", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "why"), [("sdpa", "as configured"), ("auto", "auto; xformers would call the same kernels")]
)
def test_sdpa_tries_nothing(
    unet: UNet2DConditionModel, install_xformers: Callable[[Attend], None], asked: str, why: str
) -> None:
    def refuse(*arguments: Tensor) -> Tensor:
        pytest.fail("xformers was called")

    install_xformers(refuse)
    assert choose(unet, asked) == AttentionChoice(name="sdpa", sentence=f"attention: sdpa ({why})")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_is_taken_if_it_works(
    unet: UNet2DConditionModel, install_xformers: Callable[[Attend], None], dtype: torch.dtype
) -> None:
    seen: list[tuple[torch.dtype, int, bool]] = []

    def recording(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        seen.append((query.dtype, query.shape[-1], query.requires_grad))
        return working(query, key, value)

    install_xformers(recording)
    choice = choose(unet, "xformers", dtype=dtype)
    assert choice.name == "xformers"
    assert choice.sentence == f"attention: xformers (tried on cpu in {dtype})"
    assert seen == [(dtype, 16, True)]  # the miniature's heads are 16 wide


@pytest.mark.usefixtures("no_xformers")
def test_absent_xformers_is_said(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ModelError, match=r"does not work on cpu in torch.float32: it is not installed;"):
        choose(unet, "xformers")


def no_operator(*arguments: Tensor) -> Tensor:
    raise NotImplementedError(
        "No operator found for `memory_efficient_attention_forward` with inputs:\n     query : ..."
    )


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("no backward operator")


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (no_operator, "NotImplementedError: No operator found for `memory_efficient_attention_forward` with inputs;"),
        (NoBackward.apply, "NotImplementedError: no backward operator;"),
        (lambda q, k, v: 1.5 * working(q, k, v), "it differs from sdpa by 1.2 of the largest value at head width 16;"),
        (lambda q, k, v: torch.nan * working(q, k, v), "it differs from sdpa by nan of"),
    ],
)
def test_a_call_that_fails_is_said_in_one_line(
    unet: UNet2DConditionModel, install_xformers: Callable[[Attend], None], attend: Attend, reason: str
) -> None:
    install_xformers(attend)
    with pytest.raises(ModelError) as caught:
        choose(unet, "xformers")
    assert f"does not work on cpu in torch.float32: {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_import_is_said(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: object) -> None:
            if name.startswith("xformers"):
                raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModelError, match=r"OSError: libcudart.so.12"):
        choose(unet, "xformers")


def test_xformers_asked_for_and_not_usable_is_an_error(
    unet: UNet2DConditionModel, install_xformers: Callable[[Attend], None]
) -> None:
    install_xformers(no_operator)
    with pytest.raises(ModelError, match=r"model.attention xformers does not work on cpu in torch.float32: .*auto or"):
        choose(unet, "xformers")


def test_both_backends_predict_alike_and_are_set_on_every_layer(
    unet: UNet2DConditionModel, install_xformers: Callable[[Attend], None]
) -> None:
    install_xformers(working)
    generator = torch.Generator().manual_seed(0)
    latents, text_states = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 16, 96)))
    added = {"text_embeds": torch.ones(2, 48), "time_ids": torch.full((2, 6), 32.0)}
    predictions = []
    for asked, processor in (("sdpa", AttnProcessor2_0), ("xformers", XFormersAttnProcessor)):
        set_attention(unet, choose(unet, asked))
        assert {type(used) for used in unet.attn_processors.values()} == {processor}
        predictions.append(unet(latents, 500, text_states, added_cond_kwargs=added).sample)
    torch.testing.assert_close(*predictions)
