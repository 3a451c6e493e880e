"""The check before the first update: policy and reference hold the same weights, so they must predict exactly alike."""

from __future__ import annotations

import math

from ds_dpo.batch import PreferenceBatch
from ds_dpo.distributed import gather_objects, is_main
from ds_dpo.errors import PreflightError
from ds_dpo.preference_step import PreferenceStep


def require_equal_start(step: PreferenceStep, batch: PreferenceBatch) -> None:
    """Compare both on each rank's first micro-batch; every rank must call it.

    Raises PreflightError on all ranks where the largest difference of their errors is not 0: with the same weights,
    dtype and kernels the paired difference is 0 by construction (diffusion.paired_error_difference), and a plain DPO
    loss ln 2.
    """
    differences = [float(str(value)) for value in gather_objects(step.largest_difference(batch))]
    if any(value != 0 for value in differences):  # NaN is not 0 either
        largest = max(differences, key=lambda value: (math.isnan(value), value))
        error = PreflightError(
            f"policy and reference come from the same weights, yet their errors differ by up to {largest:g} before the "
            "first update; the attention kernels, a dtype or the weights are not the same on both sides"
        )
        error.is_said_elsewhere = not is_main()
        raise error
