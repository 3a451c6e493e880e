"""Earlier launches of the same run folder: one that lives is left alone, what one that died left behind is ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ds_dpo.errors import ConfigError
from ds_dpo.supervision.lease import RENEW_SECONDS, end_lease, leases, read_notice, remove_lease
from ds_dpo.supervision.lease_watch import LOOK_SECONDS

# a launcher that lives renews its lease in this time, and an NFS client shows it
PATIENCE_SECONDS = 2.5 * RENEW_SECONDS


def end_earlier_launches(run_folder: Path, *, wait: Callable[[float], None] = time.sleep) -> list[str]:
    """Tell ranks that a dead launcher left in a run folder to leave, and wait for it; returns remarks.

    Raises ConfigError where another launch is training there.
    """
    remarks: list[str] = []
    for path in leases(run_folder):
        notice = read_notice(path)
        if notice is None or notice.word == "end":
            remove_lease(path)
            continue
        wait(PATIENCE_SECONDS)
        later = read_notice(path)
        if later is not None and later.count != notice.count:
            raise ConfigError(
                f"output_dir {run_folder} is in use: the launcher on {later.launcher.replace(' ', ', process ')}, "
                f"trains there; `touch {run_folder / 'STOP'}` lets it save and leave"
            )
        if later is not None:
            end_lease(path)
            remarks.append(
                f"the launcher before this one ({later.launcher.replace(' ', ', process ')}) ended without its ranks; "
                "those that are left leave now"
            )
            wait(3 * LOOK_SECONDS)
    return remarks
