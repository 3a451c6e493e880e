"""Earlier launches in the same run folder: a live one is refused, and ranks left by a dead one are ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ds_dpo.errors import ConfigError
from ds_dpo.supervision.lease import RENEW_SECONDS, end_lease, leases, read_notice, remove_lease
from ds_dpo.supervision.lease_watch import LOOK_SECONDS
from ds_dpo.supervision.stop import stop_command

# a live launcher renews its lease in this time, and an NFS client sees it
PATIENCE_SECONDS = 2.5 * RENEW_SECONDS


def end_earlier_launches(run_folder: Path, *, wait: Callable[[float], None] = time.sleep) -> list[str]:
    """End the ranks that a dead launcher left in a run folder, and wait until they exit. Returns remarks.

    Raises ConfigError if another launch is training there.
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
                f"output_dir {run_folder} is in use by the launcher on {later.launcher.replace(' ', ', process ')}; "
                f"`{stop_command(run_folder)}` makes it save and exit"
            )
        if later is not None:
            end_lease(path)
            remarks.append(
                f"the previous launcher ({later.launcher.replace(' ', ', process ')}) ended before its ranks; the "
                "remaining ranks exit now"
            )
            wait(3 * LOOK_SECONDS)
    return remarks
