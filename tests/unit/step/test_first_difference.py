"""Differences made by hand between a policy and its reference: the message names the module and what sets them apart.

Layers decide by strides, alignment and so on what they compute, so that each kind of difference shows on any processor.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ds_dpo.models.denoiser.adapters import adapters_disabled
from ds_dpo.step.first_difference import Side, first_difference


class ChoosesKernels(nn.Linear):
    """Multiplies by its weight, and rounds otherwise for other strides, alignment or modes."""

    def forward(self, value: Tensor) -> Tensor:
        off = 0.5 * (not value.is_contiguous()) + 0.25 * (self.weight.data_ptr() % 64 > 0) + self.offset
        return super().forward(value) + off

    offset = 0.0


class Net(nn.Module):
    """Two layers, one of which is called twice, between operations that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([ChoosesKernels(4, 4), nn.Linear(4, 4)])
        self.attention = Attention(query_dim=4, heads=2, dim_head=2)
        self.as_it_comes: Callable[[Tensor], Tensor] = lambda value: value

    def forward(self, value: Tensor) -> Tensor:
        value = self.first(value)
        value = self.first(value)
        value = self.blocks[0](self.as_it_comes(value))
        return self.attention(self.blocks[1](value.to(self.blocks[1].weight.dtype)).float())


INPUT = torch.linspace(-1, 1, 24).view(2, 3, 4)


def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    policy = Net()
    return policy, copy.deepcopy(policy)


def side(net: nn.Module) -> Side:
    @torch.no_grad()
    def predict() -> Tensor:
        return net(INPUT)

    return Side(module=net, predict=predict)


def misaligned(weight: Tensor) -> Tensor:
    """Return a copy at an address that is 8 bytes past a multiple of 64."""
    room = torch.empty(weight.numel() + 32)
    start = (-room.data_ptr() % 64 + 8) // 4
    return room[start : start + weight.numel()].view_as(weight).copy_(weight)


def transposed(value: Tensor) -> Tensor:
    return value.transpose(1, 2).contiguous().transpose(1, 2)


@torch.no_grad()
def other_weight(policy: Net, reference: Net) -> None:
    reference.blocks[1].weight[2, 3] += 1


def other_layout(policy: Net, reference: Net) -> None:
    policy.as_it_comes = transposed


def other_alignment(policy: Net, reference: Net) -> None:
    policy.blocks[0].weight.data = misaligned(policy.blocks[0].weight.data)


def other_dtype(policy: Net, reference: Net) -> None:
    reference.blocks[1].bfloat16()


def other_processor(policy: Net, reference: Net) -> None:
    class Rounded(AttnProcessor):
        def __call__(self, *arguments: object, **named: object) -> Tensor:
            return super().__call__(*arguments, **named) + 1

    policy.attention.set_processor(AttnProcessor2_0())
    reference.attention.set_processor(Rounded())


def another_kernel(policy: Net, reference: Net) -> None:
    policy.blocks[0].offset = 0.125


def an_active_adapter(policy: Net, reference: Net) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["first"], r=1, init_lora_weights=False), policy)


@pytest.mark.parametrize(
    ("make", "name", "cause"),
    [
        (other_weight, "blocks.1 (Linear)", "weights: its weight has other values in the policy than in the reference"),
        (
            other_layout,
            "blocks.0 (ChoosesKernels)",
            "by up to 0.5; layout: its input 0 has strides (12, 1, 3) in the policy, (12, 4, 1) in the reference",
        ),
        (
            other_alignment,
            "blocks.0 (ChoosesKernels)",
            "by up to 0.25; alignment: its weight begins at a multiple of 8 bytes in the policy, 64 bytes in the",
        ),
        (
            other_dtype,
            "blocks.1 (Linear)",
            "dtype: its input 0 is float32 in the policy, bfloat16 in the reference (and 2 more of its tensors)",
        ),
        (
            other_processor,
            "attention (Attention)",
            "kernel: AttnProcessor2_0 computes its attention in the policy, Rounded in the reference",
        ),
        (
            another_kernel,
            "blocks.0 (ChoosesKernels)",
            "by up to 0.125; kernel: weights, dtypes, layout and alignment are the same, so torch chose other kernels",
        ),
        (an_active_adapter, "first (Linear)", "weights: its low-rank layers in the policy change its output"),
    ],
)
def test_the_first_module_is_named_with_what_sets_it_apart(
    make: Callable[[Net, Net], None], name: str, cause: str
) -> None:
    policy, reference = nets()
    make(policy, reference)
    said = first_difference(side(policy), side(reference))
    assert said is not None
    assert said.startswith(f"the first module that differs is {name}: it reads ")
    assert cause in said


def test_a_later_call_of_a_layer_counts_by_itself() -> None:
    policy, reference = nets()
    calls = []

    def second_call_differs(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        calls.append(1)
        return output + (len(calls) % 2 == 0)

    policy.first.register_forward_hook(second_call_differs)
    said = first_difference(side(policy), side(reference))
    assert said is not None
    assert "differs is first (Linear): it reads the same values, and its outputs differ by up to 1;" in said


def test_what_differs_between_layers_is_found_in_the_module_around_them() -> None:
    policy, reference = nets()
    policy.as_it_comes = lambda value: value + 1
    said = first_difference(side(policy), side(reference))
    assert said is not None
    assert said.startswith("the first module that differs is the whole Net: it reads the same values")
    assert said.endswith("inside it, blocks.0 (ChoosesKernels) is the first to read other values")


@torch.no_grad()
def test_where_all_modules_read_other_values_the_first_of_them_is_named() -> None:
    policy, reference = nets()
    sides = side(policy), Side(module=reference, predict=lambda: reference(INPUT + 1))
    said = first_difference(*sides)
    assert said is not None
    assert said.startswith("the first module that differs is first (Linear): it reads other values")


def test_an_adapter_that_adds_nothing_does_not_differ_whoever_the_reference_is() -> None:
    policy, reference = nets()
    inject_adapter_in_model(LoraConfig(target_modules=["first", "to_q", "0"], r=1), policy)
    assert first_difference(side(policy), side(reference)) is None
    # and itself without the adapter, which a changed frozen weight changes alike
    with torch.no_grad():
        policy.first.base_layer.weight += 1

    def without() -> Tensor:
        with adapters_disabled(policy), torch.no_grad():
            return policy(INPUT)

    assert first_difference(side(policy), Side(module=policy, predict=without)) is None
    said = first_difference(side(policy), side(reference))
    assert said is not None
    assert "differs is first (Linear)" in said
    assert "weights: its weight has other values" in said


def test_minus_zero_is_zero() -> None:
    policy, reference = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())
    for net, zero in ((policy, 0.0), (reference, -0.0)):
        net[0].register_forward_hook(lambda module, inputs, output, zero=zero: torch.full_like(output, zero))
    with torch.no_grad():
        assert first_difference(side(policy), side(reference)) is None


def test_activations_are_not_kept() -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            nonlocal most
            result = value + 1
            made.append(weakref.ref(result))
            most = max(most, sum(each() is not None for each in made))
            return result

    nets = [nn.Sequential(*(Watched() for _ in range(20))) for _ in range(2)]
    nets[0][9].register_forward_hook(lambda module, inputs, output: output * 2)
    said = first_difference(*map(side, nets))
    assert said is not None
    assert "differs is 9 (Watched)" in said
    assert len(made) == 80, "two passes of each side"
    assert most <= 4, "what a layer reads and returns, and its result before the hook"
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in nets[1].modules()) == 0


def test_every_call_makes_the_same_passes_whether_or_not_it_finds_something() -> None:
    """Ranks that share weights wait for each other in each pass."""
    passes = []
    for make in (other_weight, lambda *_: None):
        policy, reference = nets()
        make(policy, reference)
        count = [0, 0]

        def predict(net: Net, number: int, count: list[int] = count) -> Tensor:
            count[number] += 1
            with torch.no_grad():
                return net(INPUT)

        sides = [
            Side(module=net, predict=partial(predict, net, number)) for number, net in enumerate((policy, reference))
        ]
        first_difference(*sides)
        passes.append(count)
    assert passes == [[2, 2], [2, 2]]
