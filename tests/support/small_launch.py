"""A launch in small: the real supervisor and real ranks, with a few lines in place of DeepSpeed and of training.

Usage: small_launch.py launcher|runner|rank FOLDER KIND
"""

import os
import subprocess
import sys
import time
from pathlib import Path

NUM_RANKS = 2
SEEN = "seen"  # in the folder, once the test knows all processes: none ends by itself before


def launcher(folder, kind):
    from ds_dpo.launch.prepare import Prepared
    from ds_dpo.launch.supervise import supervise
    from ds_dpo.supervision.lease import LEASE_VARIABLE, Lease

    lease = Lease(folder)
    command = [sys.executable, __file__, "runner", str(folder), kind]
    environ = {**os.environ, LEASE_VARIABLE: str(lease.path)}
    sys.exit(supervise(Prepared(command=command, environ=environ, lease=lease, world_size=NUM_RANKS, remarks=[])))


def runner(folder, kind):
    ranks = [
        subprocess.Popen([sys.executable, __file__, "rank", str(folder), kind], env={**os.environ, "RANK": str(rank)})
        for rank in range(NUM_RANKS)
    ]
    statuses = [rank.wait() for rank in ranks]
    if kind == "stays":
        time.sleep(3600)
    sys.exit(max(status if status >= 0 else 128 - status for status in statuses))


def rank(folder, kind):
    from ds_dpo.config.load import load_config
    from ds_dpo.process.departure import say
    from ds_dpo.supervision.rank import Supervision

    # a busy machine renews a lease late
    settings = {"lease_seconds": 12, "hang_floor_seconds": 1, "hang_factor": 2}
    options = [f"--supervision.{name}={value}" for name, value in settings.items()]
    config = load_config(["--config", "miniature", f"--output_dir={folder}", *options]).config
    number = os.environ["RANK"]
    with Supervision(config, os.environ) as supervision:
        print(f"rank {number} is process {os.getpid()}", flush=True)
        if kind == "hangs":
            supervision.hang.start()
            for _ in range(2):
                supervision.hang.beat()
                supervision.hang.end_step()
        while not supervision.stop.is_asked(look_for_file=True):
            time.sleep(0.1)
            if kind == "says_nothing" and (folder / SEEN).exists():
                return
        while kind == "ignores_the_request":
            time.sleep(1)
        say(f"rank {number} saved")
        supervision.record_end(is_done=False)


if __name__ == "__main__":
    {"launcher": launcher, "runner": runner, "rank": rank}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
