"""What layers read is row-major, whatever its strides were and whichever mode the module is in."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ds_dpo.models.layout import read_row_major, row_major

NHWC = torch.channels_last


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        (torch.arange(24).view(2, 3, 2, 2).contiguous(memory_format=NHWC), (12, 4, 2, 1)),
        (torch.arange(6).view(2, 3).T, (2, 1)),
        # torch calls these contiguous
        (torch.arange(6).as_strided((2, 3, 1, 1), (3, 1, 3, 3)), (3, 1, 1, 1)),
        (torch.arange(6).as_strided((1, 2, 3), (99, 3, 1)), (6, 3, 1)),
        (torch.tensor(3), ()),
        (torch.empty(0, 3), (3, 1)),
    ],
)
def test_strides_follow_from_sizes(tensor: Tensor, strides: tuple[int, ...]) -> None:
    assert row_major(tensor).stride() == strides
    assert torch.equal(row_major(tensor), tensor)


def test_what_is_row_major_already_is_not_copied() -> None:
    tensor = torch.zeros(2, 3, 1, 1)
    assert row_major(tensor) is tensor
    ambiguous = torch.zeros(6).as_strided((2, 3, 1, 1), (3, 1, 3, 3))
    assert row_major(ambiguous).data_ptr() == ambiguous.data_ptr()


def test_a_gradient_goes_through() -> None:
    leaf = torch.arange(6.0).view(2, 3, 1, 1).requires_grad_()
    row_major(leaf.as_strided((2, 3, 1, 1), (3, 1, 3, 3))).mul(torch.arange(6.0).view(2, 3, 1, 1)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("is_training", [True, False])
def test_a_resnet_answers_alike_in_both_modes(is_training: bool) -> None:
    """diffusers makes the input of its shortcut contiguous in training mode alone."""
    block = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=None).train(is_training)
    read_row_major(block)
    found = block(torch.randn(1, 32, 4, 4).contiguous(memory_format=NHWC), None)
    assert found.stride() == (1024, 16, 4, 1)


def test_layers_without_weights_read_what_they_get() -> None:
    seen = []
    layers = nn.Sequential(nn.SiLU(), nn.Conv2d(2, 2, 1))
    for layer in layers:
        layer.forward = lambda value: seen.append(value.stride()) or value  # type: ignore[method-assign]
    read_row_major(layers)
    layers(torch.zeros(1, 2, 3, 3).contiguous(memory_format=NHWC))
    assert seen == [(18, 1, 6, 2), (18, 9, 3, 1)]
