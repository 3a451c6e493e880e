"""Start real trainings, many in one launch, and read what they left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def spell(settings):
    """Turn options of train.py into the arguments of one start; __ in a name stands for a dot."""
    return [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]


def zero_stage(arguments):
    """Sort by stage: ZeRO-3 replaces torch's linear for the rest of a process, which changes last bits."""
    (name,) = (text.partition("=")[2] for text in arguments if text.startswith("--deepspeed_config="))
    return int(Path(name).name[4])


def launch(cases, folder, *, ranks, program="train_cases.py", by="forks"):
    """Run the starts one after another on so many ranks; by: forks, or DeepSpeed's launcher."""
    file = folder / f"cases_{ranks}.json"
    file.write_text(json.dumps(cases))
    command = [str(HERE / program), str(file)]
    environment = {**ENVIRONMENT, "FAKE_FP16": "1"}
    if by == "forks":
        done = forked.run(command, env=environment, cwd=ROOT, ranks=ranks)
    else:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        launcher = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        done = subprocess.run([*launcher, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run, name="loss"):
    return [line[name] for line in metrics(run)]
