"""One memory layout for weights and activations, so that a policy and its reference get the same kernels.

torch chooses kernels by the strides of what they read, and they round differently. So everything that a denoiser's
layers read is row-major: the last index moves fastest, as in NCHW.
"""

from __future__ import annotations

from torch import Tensor, nn


def row_major(tensor: Tensor) -> Tensor:
    """Return a tensor with the strides that its sizes alone give: itself if it has them, else a view or a copy.

    torch calls a tensor contiguous whatever the strides of its sides of length 1 are, and guesses from them whether a
    1 x 1 convolution is in NCHW or NHWC. The strides that this function returns always mean NCHW.
    """
    if not tensor.is_contiguous():
        return row_major(tensor.contiguous())
    if 1 not in tensor.shape or tensor.stride() == _strides(tensor):
        return tensor
    return tensor.reshape(-1).view(tensor.shape)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    strides, stride = [], 1
    for size in reversed(tensor.shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


def read_row_major(module: nn.Module) -> None:
    """Let each layer that has weights read its inputs row-major, in training and evaluation mode alike.

    Two things otherwise choose other kernels for a frozen reference than for the policy. diffusers' ResnetBlock2D makes
    the input of its 1 x 1 convolution contiguous in training mode only, while the latents of a VAE with attention are
    NHWC on a CPU. And torch multiplies a transposed view by `mm` if the weight requires a gradient, and by `bmm` if
    not, even under no_grad (should_fold in aten/src/ATen/native/LinearAlgebra.cpp).
    """
    for layer in module.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_pre_hook(_row_major_inputs)


def _row_major_inputs(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(row_major(value) if isinstance(value, Tensor) else value for value in inputs)
