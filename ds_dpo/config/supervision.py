"""The section on what ends a run that hangs or has lost its launcher."""

from __future__ import annotations

from ds_dpo.config.base import Section, free_field


class SupervisionConfig(Section):
    """How long ranks wait for a micro-batch, for each other and for their launcher before they exit."""

    hang_factor: float = free_field(
        "A micro-batch that takes more than X times the median of the last 50 is a hang: all ranks write their stacks "
        "to files and exit.",
        default=10.0,
        ge=2,
    )
    hang_floor_seconds: float = free_field(
        "A micro-batch shorter than this is never a hang. Those of the first step of a start, which may compile "
        "kernels, get three times this.",
        default=600.0,
        gt=0,
    )
    lease_seconds: float = free_field(
        "Ranks exit when scripts/launch.py has not renewed its lease for this long.", default=15.0, ge=6
    )
    meeting_seconds: float | None = free_field(
        "Seconds that ranks wait for each other before anything is loaded. If unset: 600 on one host and under srun, "
        "torchrun and scripts/launch.py, else 15.",
        default=None,
        gt=0,
    )
    collective_timeout_minutes: float = free_field(
        "Minutes that a rank waits for the others in a collective, and that a save or other work between steps may "
        "take. It must exceed the time in which rank 0 downloads, counts pairs or draws images alone.",
        default=60.0,
        gt=0,
    )
