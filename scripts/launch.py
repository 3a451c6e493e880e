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
