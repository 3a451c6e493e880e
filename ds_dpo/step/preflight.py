"""The check before the first update: with the same weights, policy and reference must predict exactly the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ds_dpo.batch import PreferenceBatch
from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.together import said_once
from ds_dpo.encoding.feed import Encode
from ds_dpo.errors import PreflightError
from ds_dpo.precision import Precision
from ds_dpo.process.say import Say
from ds_dpo.step.preference_step import PreferenceStep


def require_equal_start(step: PreferenceStep, batch: PreferenceBatch) -> None:
    """Compare policy and reference on each rank's first micro-batch; every rank must call this.

    Raises PreflightError on all ranks if the largest difference of their errors is not 0: with the same weights, dtype
    and kernels the paired difference is exactly 0 (noise_schedule.paired_error_difference), and a plain DPO loss ln 2.
    """
    differences = gather_objects(step.largest_difference(batch))
    if any(value != 0 for value in differences):  # NaN is not 0 either
        largest = max(differences, key=lambda value: (math.isnan(value), value))
        error = PreflightError(
            f"policy and reference have the same weights, but their errors differ by up to {largest:g} before the "
            "first update; their attention kernels, dtypes or weights are not the same"
        )
        raise said_once(error)


# Largest difference that rounding causes between errors of the same weights, as a share of the error: other images in
# the batch change the last bits. docs/cache.md has measurements; another noise or timestep changes an error by half.
NEAR_ERRORS = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}


def relative_difference(found: Tensor, stored: Tensor) -> Tensor:
    """Return |found - stored| as a share of the stored error."""
    return (found - stored).abs() / stored.clamp(min=1e-6)


@torch.no_grad()
def require_near_start(step: PreferenceStep, batch: PreferenceBatch, *, precision: str) -> float:
    """Compare a fresh policy's errors with the cached ones of its start on each rank's first micro-batch.

    Returns the largest difference over all ranks as a share of the error; every rank must call this. Raises
    PreflightError on all ranks if it is larger than rounding in this precision can be.
    """
    policy = torch.cat(step.policy_errors(batch))
    cached = torch.cat(batch.reference_errors())
    own = float(relative_difference(policy, cached).max())
    # NaN counts as infinite
    largest = max(math.inf if math.isnan(value) else value for value in gather_objects(own))
    if largest <= NEAR_ERRORS[precision]:
        return largest
    error = PreflightError(
        f"the errors in reference.cache differ from those of the policy by a share of up to {largest:.2g} before the "
        f"first update, but rounding in {precision} causes at most {NEAR_ERRORS[precision]:g}: the cache is not of "
        "this run's reference; make it again with scripts/cache.py --reference"
    )
    raise said_once(error)


def look_at_start(
    step: PreferenceStep,
    encode: Encode,
    batches: Iterator[Any],
    *,
    is_resumed: bool,
    precision: Precision,
    say: Say,
) -> Iterator[Any]:
    """Do the check before the first update. Returns all batches, including the one that it used.

    Raises PreflightError on all ranks.
    """
    if is_resumed:
        say("preflight: skipped, because a resumed policy differs from its reference")
        return batches
    if not step.compares_with_reference:
        say("preflight: skipped, because this objective has no reference")
        return batches
    first = next(batches)
    if step.reads_reference_errors:
        largest = require_near_start(step, encode(first), precision=precision)
        say(
            "preflight: approximate, because a cached reference has errors but no predictions; they differ from the "
            f"policy's by a share of up to {largest:.2g}, within rounding"
        )
        return chain([first], batches)
    require_equal_start(step, encode(first))
    say("preflight: policy and reference predict exactly the same (largest difference 0)")
    return chain([first], batches)
