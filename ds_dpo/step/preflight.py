"""The check before the first update: with the same weights, policy and reference must predict exactly the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.models import Preflight
from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.together import said_once
from ds_dpo.encoding.feed import Encode
from ds_dpo.errors import PreflightError
from ds_dpo.precision import NEAR_ERRORS, Precision
from ds_dpo.process.say import Say
from ds_dpo.step.preference_step import PreferenceStep, share_of_error


def require_equal_start(
    step: PreferenceStep, batch: PreferenceBatch, *, precision: Precision, preflight: Preflight
) -> str:
    """Compare policy and reference on each rank's first micro-batch, and return a line on it; every rank calls this.

    With the same weights, dtype and kernels the paired difference is exactly 0 (noise_schedule.paired_error_difference)
    and a plain DPO loss ln 2. Raises PreflightError on all ranks if the errors differ on any: by anything if preflight
    is exact, by a larger share than rounding causes in this precision if it is near.
    """
    difference, share = (_largest(float(values.max())) for values in step.differences(batch))
    if difference == 0:
        return "preflight: policy and reference predict exactly the same (largest difference 0)"
    where = _first_of_ranks(step.first_difference(batch))
    bound = NEAR_ERRORS[precision]
    found = f"their errors differ by up to {difference:.6g} before the first update, a share of {share:.2g}; {where}"
    if share > bound:
        allowed = f"reference.preflight near allows a share of {bound:g} in {precision}" if preflight == "near" else ""
    elif preflight == "exact":
        allowed = f"reference.preflight near would allow it, up to a share of {bound:g} in {precision}"
    else:
        return (
            f"warning: preflight: policy and reference have the same weights, but {found}. reference.preflight near "
            f"allows a share of {bound:g} in {precision}, so the run goes on; its first loss is not exact"
        )
    said = f"policy and reference have the same weights, but {found}" + (f". {allowed}" if allowed else "")
    raise said_once(PreflightError(said))


def _largest(own: float) -> float:
    """Return the largest value over all ranks; NaN counts as infinite."""
    return max(math.inf if math.isnan(value) else value for value in gather_objects(own))


def _first_of_ranks(own: str | None) -> str:
    found = next((of_rank for of_rank in gather_objects(own) if of_rank is not None), None)
    return found or "a second pass finds no module that differs, so kernels are not deterministic on this device"


@torch.no_grad()
def require_near_start(step: PreferenceStep, batch: PreferenceBatch, *, precision: Precision) -> float:
    """Compare a fresh policy's errors with the cached ones of its start on each rank's first micro-batch.

    Returns the largest difference over all ranks as a share of the error; every rank must call this. Raises
    PreflightError on all ranks if it is larger than rounding in this precision can be.
    """
    policy = torch.cat(step.policy_errors(batch))
    cached = torch.cat(batch.reference_errors())
    largest = _largest(float(share_of_error(policy - cached, cached).max()))
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
    preflight: Preflight,
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
    say(require_equal_start(step, encode(first), precision=precision, preflight=preflight))
    return chain([first], batches)
