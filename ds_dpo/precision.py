"""The precisions that a run can have, and their dtypes in torch; imports torch only where a dtype is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
TORCH_NAMES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Largest difference that rounding causes between errors of the same weights, as a share of the error: other kernels, or
# other images in the batch, change the last bits. docs/cache.md has measurements; another noise or timestep changes an
# error by half.
NEAR_ERRORS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return torch's dtype of a precision. Raises KeyError for any other name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[precision])
    return dtype


def precision_of_dtype(dtype: torch.dtype) -> Precision:
    """Return the precision of one of torch's dtypes. Raises KeyError for a dtype that no run has."""
    return {f"torch.{name}": precision for precision, name in TORCH_NAMES.items()}[str(dtype)]
