"""Align weights in memory and lay them out in one way, so that a policy and its reference get the same kernels."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

from ds_dpo.models.layout import row_major

# A cache line, to which torch's CPU allocator aligns, and what cuBLASLt checks. No known kernel needs more.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 256}


def align_weights(module: nn.Module) -> None:
    """Move each parameter and buffer that begins at an odd address or is not row-major; its values stay.

    Weights mapped from a safetensors file begin wherever its header ends, 24 or 40 bytes past a multiple of 64. Some
    processors (AMD EPYC) then round matrix products differently, by 1e-7, than with an aligned copy of the weights, so
    that a reference would not predict exactly what its policy does.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        laid_out = row_major(tensor.detach())
        if not is_aligned(laid_out):
            # torch's allocators return aligned memory on any device
            laid_out = laid_out.clone()
        if laid_out.data_ptr() != tensor.data_ptr() or laid_out.stride() != tensor.stride():
            tensor.data = laid_out


def is_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor begins at a multiple of its device's alignment; True for one without memory."""
    return tensor.data_ptr() % ALIGNMENT_BYTES.get(tensor.device.type, 1) == 0
