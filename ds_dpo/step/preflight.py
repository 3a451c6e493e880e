"""The check before the first update: policy and reference hold the same weights, so they must predict exactly alike."""

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
    """Compare both on each rank's first micro-batch; every rank must call this.

    Raises PreflightError on all ranks if the largest difference of their errors is not 0: with the same weights,
    dtype and kernels the paired difference is 0 by construction (diffusion.paired_error_difference), and a plain DPO
    loss ln 2.
    """
    differences = gather_objects(step.largest_difference(batch))
    if any(value != 0 for value in differences):  # NaN is not 0 either
        largest = max(differences, key=lambda value: (math.isnan(value), value))
        error = PreflightError(
            f"policy and reference come from the same weights, yet their errors differ by up to {largest:g} before the "
            "first update; the attention kernels, a dtype or the weights are not the same on both sides"
        )
        raise said_once(error)


# Largest difference that rounding leaves between errors of the same weights, as a share of the error: other images in
# the batch change last bits. docs/cache.md has what was measured; another noise or timestep changes it by half.
NEAR_ERRORS = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}


def relative_difference(found: Tensor, stored: Tensor) -> Tensor:
    """Return |found - stored| as a share of the stored error."""
    return (found - stored).abs() / stored.clamp(min=1e-6)


@torch.no_grad()
def require_near_start(step: PreferenceStep, batch: PreferenceBatch, *, precision: str) -> float:
    """Compare a fresh policy's errors with the cached ones of its start on each rank's first micro-batch.

    Returns the largest difference as a share of the error, over all ranks; every rank must call this. Raises
    PreflightError on all ranks where it is more than rounding in this precision leaves.
    """
    assert batch.reference_chosen_error is not None
    assert batch.reference_rejected_error is not None
    policy = torch.cat(step.policy_errors(batch))
    cached = torch.cat([batch.reference_chosen_error, batch.reference_rejected_error])
    own = float(relative_difference(policy, cached).max())
    # NaN is no small difference
    largest = max(math.inf if math.isnan(value) else value for value in gather_objects(own))
    if largest <= NEAR_ERRORS[precision]:
        return largest
    error = PreflightError(
        f"the errors in reference.cache differ from those of the policy by up to {largest:.2g} of themselves before "
        f"the first update, and rounding in {precision} leaves at most {NEAR_ERRORS[precision]:g}: the cache is not of "
        "this run's reference; make it anew with scripts/cache.py --reference"
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
    """Check what can be checked before the first update; returns the batches, the one that was looked at included.

    Raises PreflightError on all ranks together.
    """
    if is_resumed:
        say("preflight: skipped, since a resumed policy differs from its reference")
        return batches
    if not step.compares_with_reference:
        say("preflight: skipped, since this objective has no reference")
        return batches
    first = next(batches)
    if step.reads_reference_errors:
        largest = require_near_start(step, encode(first), precision=precision)
        say(
            "preflight: not to the bit, since a cached reference has errors and no predictions; they differ from the "
            f"policy's by up to {largest:.2g} of themselves, as rounding may"
        )
        return chain([first], batches)
    require_equal_start(step, encode(first))
    say("preflight: policy and reference predict exactly alike (largest difference 0)")
    return chain([first], batches)
