"""At which addresses weights begin in memory: a policy and its reference must get the same kernels."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

# A cache line, which torch's CPU allocator keeps to, and what cuBLASLt looks at. Larger than any known kernel asks for.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 256}


def align_weights(module: nn.Module) -> None:
    """Move each parameter and buffer that begins at an odd address to memory of its own; its values stay.

    Weights mapped from a safetensors file begin wherever its header ends, 24 or 40 bytes past a multiple of 64. Some
    processors (AMD EPYC) then round matrix products by 1e-7 otherwise than with an aligned copy of the same weights, so
    that a reference would not predict to the bit what its policy does.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if not is_aligned(tensor):
            # a fresh piece of memory from torch's allocators is aligned, on any device
            tensor.data = tensor.data.clone()


def is_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor begins at a multiple of its device's alignment; True for one without memory."""
    return tensor.data_ptr() % ALIGNMENT_BYTES.get(tensor.device.type, 1) == 0
