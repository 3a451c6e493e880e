#!/usr/bin/env python
"""What a training step takes beside a bare PyTorch loop of the same model work, and beside the authors' work list.

    python benchmarks/step.py                       everything; about half an hour on two quiet cores
    python benchmarks/step.py --only miniature      one part: zero1_acc1 ... zero3_acc8, miniature, or authors

Every measurement is a process of one rank and one thread: the product's is train.py itself, whose median step_seconds
counts data, encoding and bookkeeping too; the others are step_plain.py. Measurements of a ratio alternate, and a ratio
is the median over the rounds. bare_ratio: our seconds over the loop's. authors_ratio: our pairs a second over theirs;
`shipped` has their offload and checkpointing, `plain` neither, `cached` is `plain` against our caches of latents, text
and reference. The large UNet has SDXL's shape, 165 M random parameters, and trains on one pair at a time at 64 px in
bf16. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
MINIATURE = ROOT / "ds_dpo" / "assets" / "miniature" / "model"
SIDE_FACTOR = 4  # of the miniature's VAE
CHANNELS, LAYERS, HEADS = (144, 288, 576), [1, 2, 2], 8
LARGE_RESOLUTION, MINIATURE_RESOLUTION, MINIATURE_PAIRS = 64, 32, 16
QUIET = {
    "config": "miniature",
    "objective.beta": 5000,
    "optimizer.learning_rate": 1e-8,
    "schedule.warmup_steps": 0,
    "cadence.sample_every_steps": "none",
    "cadence.save_every_steps": 1000,
    "data.max_rows": 64,
}
Measure = Callable[[], list[float]]


@dataclass(frozen=True)
class Comparison:
    """A ratio: that of the seconds of two measurements, the upper over the lower."""

    part: str
    group: str
    name: str
    upper: Measure
    lower: Measure


# ---- what is measured, each in a process of its own ----


def ours(folder: Path, steps: int, options: Mapping[str, object]) -> list[float]:
    """Train with train.py; returns the seconds of its steps after those that warm up."""
    from step_plain import WARM_UP

    from ds_dpo.train import main as train

    with tempfile.TemporaryDirectory(dir=folder) as run:
        given = {**QUIET, **options, "output_dir": f"{run}/run", "max_train_steps": WARM_UP + steps}
        train([f"--{name}={value}" for name, value in given.items()])
        lines = Path(run, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step_seconds"] for line in lines][WARM_UP:]


def plain(name: str, folder: Path, options: Mapping[str, Any]) -> list[float]:
    """Do steps of step_plain.py."""
    import step_plain

    return list(getattr(step_plain, name)(folder, **options))


def make_large(folder: Path) -> None:
    """Write the miniature's pipeline with a UNet of 165 M random parameters."""
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(MINIATURE, folder, ignore=shutil.ignore_patterns("unet"), copy_function=shutil.copyfile)
    config = json.loads((MINIATURE / "unet" / "config.json").read_text(encoding="utf-8"))
    config |= {
        "block_out_channels": CHANNELS,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": LAYERS,
        "layers_per_block": 2,
        "attention_head_dim": [HEADS] * len(CHANNELS),
        "norm_num_groups": HEADS,
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).to(torch.bfloat16).save_pretrained(folder / "unet")


def make_caches(folder: Path, options: Mapping[str, object], steps: int) -> None:
    """Make the caches of latents and text, and of the reference's errors."""
    from step_plain import WARM_UP

    from ds_dpo.__main__ import run_command

    given = [f"--{name}={value}" for name, value in {**QUIET, **options}.items()]
    run_command("cache", [*given, "--dtype=fp32", f"--out={folder / 'latents'}"])
    reference = ["--reference", f"--max_train_steps={WARM_UP + steps}", f"--out={folder / 'reference'}"]
    run_command("cache", [*given, *reference])


# ---- the ratios ----


def comparisons(folder: Path, steps: int) -> list[Comparison]:
    large = folder / "large"
    of_large = {
        "model.pretrained": large,
        "data.resolution": LARGE_RESOLUTION,
        "model.gradient_checkpointing": "false",
        "batch.micro_batch_pairs": 1,
    }
    side = LARGE_RESOLUTION // SIDE_FACTOR
    found = []
    for stage in (1, 2, 3):
        for micro_batches in (1, 8):
            engine = {"deepspeed_config": f"zero{stage}_bf16", "batch.pairs_per_step": micro_batches}
            number = max(2, steps // micro_batches)
            loop = {"dtype": "bf16", "pairs": 1, "micro_batches": micro_batches, "side": side, "steps": number}
            name = f"zero{stage}_acc{micro_batches}"
            upper = partial(ours, folder, number, {**of_large, **engine})
            found.append(Comparison(name, "bare_ratio", name, upper, partial(plain, "bare", large, loop)))
    from ds_dpo.distributed.half_precision import faster_on_cpu

    precision = faster_on_cpu("bf16")  # as the quickstart chooses
    engine = {"deepspeed_config": "zero2_fp32_cpu" if precision == "fp32" else "zero2_bf16"}
    whole = {"batch.pairs_per_step": MINIATURE_PAIRS, "batch.micro_batch_pairs": MINIATURE_PAIRS}
    of_miniature = partial(ours, folder, 5 * steps, {**engine, **whole})
    side = MINIATURE_RESOLUTION // SIDE_FACTOR
    loop = {"dtype": precision, "pairs": MINIATURE_PAIRS, "micro_batches": 1, "side": side, "steps": 5 * steps}
    bare = partial(plain, "bare", MINIATURE, loop)
    found.append(Comparison("miniature", "bare_ratio", "miniature", of_miniature, bare))
    one = {"deepspeed_config": "zero1_bf16", "batch.pairs_per_step": 1}
    caches = {
        "data.cache": folder / "latents",
        "reference.residency": "cached",
        "reference.cache": folder / "reference",
    }
    online = partial(ours, folder, steps, {**of_large, **one})
    cached = partial(ours, folder, steps, {**of_large, **one, **caches})
    theirs = {"dtype": "bf16", "pairs": 1, "resolution": LARGE_RESOLUTION, "steps": steps}
    shipped = partial(plain, "authors", large, {**theirs, "checkpointing": True, "offload": True})
    without = partial(plain, "authors", large, {**theirs, "checkpointing": False, "offload": False})
    theirs = {"dtype": precision, "pairs": MINIATURE_PAIRS, "resolution": MINIATURE_RESOLUTION, "steps": 5 * steps}
    small = partial(plain, "authors", MINIATURE, {**theirs, "checkpointing": False, "offload": False})
    found += [
        Comparison("authors", "authors_ratio", "shipped", shipped, online),
        Comparison("authors", "authors_ratio", "plain", without, online),
        Comparison("authors", "authors_ratio", "cached", without, cached),
        Comparison("authors", "authors_ratio", "miniature_plain", small, of_miniature),
    ]
    return found


# ---- rounds ----


def in_process(work: Callable[[], Any]) -> Any:
    """Return what some work returns in a process of its own, a fork of one that has imported everything."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_send, args=(sender, work))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        sys.exit(f"a measurement failed: {work}")
    finally:
        process.join()


def _send(sender: Any, work: Callable[[], Any]) -> None:
    threading.Thread(target=_die_with_program, daemon=True).start()
    sys.path.insert(0, str(Path(__file__).parent))
    shown = os.dup(1)
    os.dup2(2, 1)  # what a run prints is not this program's
    sender.send(work())
    sender.close()
    os.dup2(shown, 1)
    os._exit(0)  # DeepSpeed's threads may abort an orderly end


def _die_with_program() -> None:
    """Wait for the end of this program, and kill the measurement, whose own parent is the process that imports."""
    program = multiprocessing.parent_process()
    assert program is not None
    connection.wait([program.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def measured(each: Comparison, rounds: int) -> float:
    """Return the median ratio, and print each round's."""
    ratios = []
    for number in range(rounds):
        pair = [each.upper, each.lower]
        order = pair if number % 2 == 0 else pair[::-1]
        seconds = {id(work): statistics.median(in_process(work)) for work in order}
        upper, lower = (seconds[id(work)] for work in pair)
        ratios.append(upper / lower)
        print(f"{each.group:14} {each.name:16} round {number + 1}: {upper:8.3f} s / {lower:8.3f} s = {ratios[-1]:.3f}")
        sys.stdout.flush()
    return statistics.median(ratios)


def report(found: Sequence[Comparison], rounds: int) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    for each in found:
        result.setdefault(each.group, {})[each.name] = round(measured(each, rounds), 3)
    for group, ratios in result.items():
        for name, ratio in ratios.items():
            print(f"| {group} | {name} | {ratio:.2f} |")
    return result


PROCESSES = multiprocessing.get_context("forkserver")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Rounds of each ratio (default: 5).")
    parser.add_argument("--steps", type=int, default=4, help="Measured steps of a process (default: 4).")
    parser.add_argument("--only", nargs="+", metavar="PART", help="Parts to measure (all if unset).")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    PROCESSES.set_forkserver_preload(["ds_dpo.training.assembly", "diffusers.models.unets.unet_2d_condition"])
    with tempfile.TemporaryDirectory(prefix="step_") as temporary:
        folder = Path(temporary)
        found = comparisons(folder, arguments.steps)
        parts = list(dict.fromkeys(each.part for each in found))
        unknown = set(arguments.only or ()) - set(parts)
        if unknown:
            parser.error(f"--only {' '.join(sorted(unknown))}: no such part; {', '.join(parts)} would fit")
        chosen = [each for each in found if arguments.only is None or each.part in arguments.only]
        if any(each.part != "miniature" for each in chosen):
            in_process(partial(make_large, folder / "large"))
        if any(each.name == "cached" for each in chosen):
            large = {"model.pretrained": folder / "large", "data.resolution": LARGE_RESOLUTION}
            one = {"deepspeed_config": "zero1_bf16", "batch.pairs_per_step": 1, "batch.micro_batch_pairs": 1}
            in_process(partial(make_caches, folder, {**large, **one}, arguments.steps))
        print(json.dumps(report(chosen, arguments.rounds)))


if __name__ == "__main__":
    main()
