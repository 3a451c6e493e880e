"""What ends a run that nobody looks after any more, or that stands still."""

from __future__ import annotations

from ds_dpo.config.base import Section, free_field


class SupervisionConfig(Section):
    """How long ranks wait for a step, for one another and for their launcher before they leave."""

    hang_factor: float = free_field(
        "a step that takes so many times the median of the last ones is a hang: all ranks write their stacks and leave",
        default=10.0,
        ge=2,
    )
    hang_floor_seconds: float = free_field(
        "but nothing shorter than this is; the first step, which may compile and tune, has three times as long",
        default=600.0,
        gt=0,
    )
    lease_seconds: float = free_field(
        "ranks leave once scripts/launch.py has not renewed its lease for so long", default=15.0, ge=6
    )
    meeting_seconds: float | None = free_field(
        "how long ranks wait for one another before anything is loaded; none: 15 over several hosts, and 600 below "
        "scripts/launch.py, which has asked the hosts, below srun and torchrun, and on one host",
        default=None,
        gt=0,
    )
    collective_timeout_minutes: float = free_field(
        "how long a rank waits for others in a collective: longer than rank 0 draws, downloads and counts alone",
        default=60.0,
        gt=0,
    )
