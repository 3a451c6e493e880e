"""How much longer a CPU computes in half precision than in fp32, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from ds_dpo.precision import Precision, torch_dtype

SLOW = 2.0  # a CPU with bf16 of its own is at 0.5 to 1.2, one that converts for each product at 5 to 20
TRIES = 3
CHANNELS, SIDE = 64, 16


def half_precision_cost(precision: Precision, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how many times as long as in fp32 a small convolution and product take, forward and backward.

    Each takes milliseconds, and the shortest of a few counts. Draws no random number.
    """
    return _seconds(torch_dtype(precision), clock) / _seconds(torch.float32, clock)


def faster_on_cpu(precision: Precision) -> Precision:
    """Return fp32 if this CPU is slow in a half precision, else the precision itself."""
    return "fp32" if precision != "fp32" and half_precision_cost(precision) > SLOW else precision


def _seconds(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    image = torch.full((4, CHANNELS, SIDE, SIDE), 0.5, dtype=dtype)
    kernel = torch.full((CHANNELS, CHANNELS, 3, 3), 0.01, dtype=dtype, requires_grad=True)
    weight = torch.full((CHANNELS, CHANNELS), 0.01, dtype=dtype, requires_grad=True)
    found = []
    for _ in range(TRIES):
        began = clock()
        features = functional.conv2d(image, kernel, padding=1)
        functional.linear(features.flatten(2).transpose(1, 2), weight).float().sum().backward()
        found.append(clock() - began)
    return min(found)
