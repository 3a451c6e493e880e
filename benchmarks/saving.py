"""What a checkpoint costs training: how long it waits for one, and how much slower its steps are while one is written.

    python benchmarks/saving.py [--parameters 150_000_000] [--folder FOLDER]

Trains linear layers with the project's engine (one rank, ZeRO-2, bf16 with fp32 master weights, AdamW: 14 bytes a
parameter in a checkpoint), in rounds of a few steps without saving, a save in the foreground, and one in the background
with steps meanwhile. A stall is the time in which no step goes on: for the background, that of noting, copying and
completing. The first save in the background also gets the memory for the copies; it is reported separately. Times
depend on the disk: give a folder on the disk to measure. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from ds_dpo.checkpoints.folder import Retention
from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.checkpoints.writer import CheckpointWriter, Contents
from ds_dpo.config.load import load_config
from ds_dpo.distributed.device import pick_device
from ds_dpo.distributed.environment import export_environment, read_environment
from ds_dpo.engine.device import silence_deepspeed, start_communication
from ds_dpo.engine.engine import Engine, build_engine
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.process.quiet import quiet_libraries

WIDTH = 2048
BATCH = 8


class Layers(nn.Module):
    """Residual linear layers, with a configuration as a diffusers model has one."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.config = {"width": WIDTH}
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, num_parameters // WIDTH**2))
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = values + 0.1 * layer(values)
        return values


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=150_000_000, help="Number of parameters.")
    parser.add_argument("--rounds", type=int, default=5, help="Saves of each kind, 2 or more.")
    parser.add_argument("--folder", type=Path, help="Folder to write (a temporary one if unset).")
    arguments = parser.parse_args()
    quiet_libraries()
    silence_deepspeed()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="saving_"))
    try:
        print(json.dumps(measure(arguments.parameters, arguments.rounds, folder)), flush=True)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    os._exit(0)


def measure(num_parameters: int, num_rounds: int, folder: Path) -> dict[str, object]:
    """Return the numbers of the last line."""
    engine = build(num_parameters)
    step = stepper(engine)
    timed(step)  # DeepSpeed and the optimizer get their memory
    identity = RunIdentity(world_size=1, stage=2, precision="bf16", fingerprint="benchmark")
    writer = CheckpointWriter(
        folder, engine=engine, identity=identity, retention=Retention(newest=1), say=lambda line: print(line)
    )
    plain, while_writing = [], []
    foreground, background, written = [], [], []
    for number in range(num_rounds):  # one after the other, so that whatever else a machine does falls on all
        plain += [timed(step) for _ in range(3)]
        foreground.append(timed(lambda number=number: save(writer, 2 * number + 1)))
        stall = timed(lambda number=number: begin(writer, 2 * number + 2))
        began = time.perf_counter()
        while writer.is_busy:
            seconds = timed(step)
            if writer.is_busy:  # one that ended after the writing did is only in part beside it
                while_writing.append(seconds)
        stall += timed(writer.finish)
        background.append(stall)
        written.append(time.perf_counter() - began)
        print(
            f"step {statistics.median(plain[-3:]):.2f} s; saved in the foreground in {foreground[-1]:.2f} s, in the "
            f"background with a stall of {stall:.2f} s, complete after {written[-1]:.2f} s",
            flush=True,
        )
    size = sum(path.stat().st_size for path in folder.glob("step_*/*"))
    return {
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "checkpoint_gib": round(size / 2**30, 3),
        "threads": torch.get_num_threads(),
        "rounds": num_rounds,
        "step_seconds": round(statistics.median(plain), 3),
        "foreground_stall_seconds": round(statistics.median(foreground), 3),
        "background_first_stall_seconds": round(background[0], 3),
        "background_stall_seconds": round(statistics.median(background[1:]), 3),
        "background_done_seconds": round(statistics.median(written[1:]), 3),
        "steps_while_writing": len(while_writing),
        "step_seconds_while_writing": round(statistics.median(while_writing), 3) if while_writing else None,
    }


def build(num_parameters: int) -> Engine:
    place = read_environment({})
    export_environment(place)
    device = pick_device(place.local_rank, os.environ, needs_gpu=False).device
    start_communication(timeout=timedelta(minutes=5), device=device)
    config = load_config(["--config", "miniature", "--deepspeed_config=zero2_bf16", "--pairs_per_step=8"]).config
    torch.manual_seed(0)
    return build_engine(
        Layers(num_parameters).to(device=device, dtype=torch.bfloat16),
        settings=resolve_deepspeed(config, world_size=1).settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=10_000,
    )


def stepper(engine: Engine) -> Callable[[], None]:
    """Return what does one whole optimizer step: a micro-batch is all that it has."""
    values = torch.randn(BATCH, WIDTH, device=engine.device, dtype=torch.bfloat16)

    return lambda: engine.backward_and_step(engine.policy(values).float().square().mean())


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds something takes, the device's work included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def begin(writer: CheckpointWriter, number: int) -> None:
    if not writer.begin(step=number, contents=Contents(client_state={"step": number}), in_background=True):
        sys.exit("there is no memory for the copies: give fewer --parameters")


def save(writer: CheckpointWriter, number: int) -> None:
    writer.save(step=number, contents=Contents(client_state={"step": number}))


if __name__ == "__main__":
    main()
