"""Check every host, then train on all of them. Takes the arguments of `deepspeed` and replaces it.

Examples:
    python scripts/launch.py --hostfile hostfiles/a100x16 ds_dpo/train.py --config sdxl_pickapic
    python scripts/launch.py --num_gpus 4 ds_dpo/train.py --config sd15_pickapic

Before anything runs, it checks that the hostfile is correct, that every host answers over ssh, has the same Python,
packages, code and configuration, sees the run folder and has a GPU for each slot, and that the first host's port is
free. It passes the environment to the ranks in output_dir/launch.env, without secrets. The ranks themselves check that
all of them have started.

It watches the run until the end. If this program, one of DeepSpeed's launchers, ssh or a host fails, all ranks exit
within half a minute. After SIGINT (Ctrl-C), SIGTERM, SIGUSR1 or SIGHUP all ranks save at the same step and exit; after
a second signal they exit at once. The exit status is that of the run: see docs/faults.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ds_dpo.config.command_text import with_start
from ds_dpo.config.version import version_text


def main(argv: Sequence[str]) -> None:
    """Launch as the arguments ask, and exit with the status of the run."""
    if not argv or argv[0] in ("-h", "--help"):
        print(with_start(__doc__ or ""))
        return
    if argv[0] == "--version":
        print(version_text())
        return
    from ds_dpo.launch.prepare import prepare_launch
    from ds_dpo.launch.supervise import supervise

    prepared = prepare_launch(argv, dict(os.environ))
    for remark in prepared.remarks:
        print(remark, flush=True)
    sys.exit(supervise(prepared))
