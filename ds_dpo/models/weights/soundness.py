"""What is wrong with a model's weights, by name: values that are not finite, scales, names of a wrapped module."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ds_dpo.errors import ModelError

# prefixes of names that belong to no model: what wrote them
WRAPPERS = {"module.": "DataParallel, DistributedDataParallel or DeepSpeed", "_orig_mod.": "torch.compile"}
# ends of names of tensors by which 8-bit weights must be multiplied (ComfyUI, torchao)
SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", "scaled_fp8")


def require_no_scales(names: Iterable[str], *, source: str) -> None:
    """Raise ModelError that names a tensor of scales: without them the weights beside them have other values."""
    scale = next((name for name in names if name.endswith(SCALES)), None)
    if scale is not None:
        raise ModelError(f"{source}: {scale} scales weights of 8 bits; give a file of weights in fp32, bf16 or fp16")


def require_finite(tensor: Tensor, name: str, *, source: str) -> None:
    """Raise ModelError that names the tensor and its source if it has NaN or an infinite value.

    A sum is not finite if an element is not, and is several times faster than a look at each element.
    """
    if not tensor.is_floating_point() or tensor.is_meta or bool(tensor.sum(dtype=torch.float32).isfinite()):
        return
    num_nan, num_infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    found = [f"{number} {what}" for number, what in ((num_nan, "NaN"), (num_infinite, "infinite")) if number]
    if found:
        raise ModelError(
            f"{source}: tensor {name} has {' and '.join(found)} of {tensor.numel()} values in "
            f"{str(tensor.dtype).removeprefix('torch.')}; give a file without them, or, if the file's own values are "
            "finite, a precision with a wider range, such as bf16"
        )


def wrapper_hint(names: Iterable[str]) -> str:
    """Return a remark for an error if names of tensors have a wrapper's prefix, else an empty text."""
    for name in names:
        for prefix, writer in WRAPPERS.items():
            if name.startswith(prefix) or (prefix == "_orig_mod." and f".{prefix}" in name):
                return f"; names such as {name} have the prefix {prefix!r} of {writer}: save the module inside it"
    return ""
