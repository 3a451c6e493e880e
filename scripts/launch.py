"""Check every host, then train on all of them: takes the arguments of `deepspeed`, in its place.

Examples:
    python scripts/launch.py --hostfile hostfiles/a100x16 ds_dpo/train.py --config sdxl_pickapic
    python scripts/launch.py --num_gpus 4 ds_dpo/train.py --config sd15_pickapic

Before anything runs: the hostfile is read strictly, every host answers over ssh, runs the same Python, packages, code
and configuration, sees the run folder, has a GPU for each slot, and the first one's port is free. What the ranks need
of this environment travels in output_dir/launch.env, without secrets; that all ranks came up is checked by them.

Then it stays: whatever of this program, DeepSpeed's launchers, ssh or a host ends, all ranks are gone half a minute
later. SIGINT (Ctrl-C), SIGTERM, SIGUSR1 or SIGHUP lets all ranks save at the same step and leave, the same once more
lets them leave at once. Its exit status is that of the run: docs/faults.md.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.errors import run_program


def main() -> None:
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    from ds_dpo.launch.prepare import prepare_launch
    from ds_dpo.launch.supervise import supervise

    prepared = prepare_launch(sys.argv[1:], dict(os.environ))
    for remark in prepared.remarks:
        print(remark, flush=True)
    sys.exit(supervise(prepared))


if __name__ == "__main__":
    run_program(main)
