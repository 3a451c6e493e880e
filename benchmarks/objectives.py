#!/usr/bin/env python
"""Train the miniature with every objective over several seeds and write what each reached to docs/objectives_table.md.

    python benchmarks/objectives.py --search      the candidates of each objective, on a seed that is not reported
    python benchmarks/objectives.py               the chosen setting of each, on the seeds that are
    python benchmarks/objectives.py --only dpo sft --seeds 0

Every run has the same pairs, steps, schedule and base; objectives differ in SETTINGS alone. A run is one process of one
rank in fp32; --jobs of them run side by side. What is done is not done again. The page holds every run that there is;
its last section is kept as it stands. About 15 minutes on two quiet cores, and as many for the search.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "objectives_table.md"
BASE_MODEL = "ds_dpo://assets/miniature/model"
BASE, CONTROL = "base", "sft"
STEPS, PAIRS_PER_STEP = 100, 16
SEEDS, SEARCH_SEED = (0, 1, 2), 100
SEEDS_PER_PROMPT = 4
# One thread a process: two processes on two cores do more than one with two threads.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
FIRST_SEED = 1_000_000  # of the evaluation, far from those of the pairs
MARGIN = 0.1  # a difference in reward, of 2, that counts as better or worse
SHARES = ("valid", "background", "shape", "colour_right")
MOVEMENTS = ("chosen_difference", "rejected_difference", "implicit_accuracy")
MOVEMENT_STEPS = 50
COMMON = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "batch.pairs_per_step": PAIRS_PER_STEP,
    "batch.micro_batch_pairs": PAIRS_PER_STEP,
    "cadence.log_every_steps": 50,
    "cadence.keep_checkpoints": 1,
    "cadence.sample_every_steps": "none",
}


@dataclass(frozen=True)
class Setting:
    """An objective with its learning rate and its own options, as in the section `objective`."""

    objective: str
    learning_rate: float
    options: Mapping[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([*(f"{name} {value}" for name, value in self.options.items()), f"rate {self.learning_rate:g}"])


# The first of each objective is the chosen one; the others are what --search chose it from.
SETTINGS: dict[str, list[Setting]] = {
    "sft": [Setting("sft", 8e-4), Setting("sft", 4e-4), Setting("sft", 2e-4), Setting("sft", 1.6e-3)],
    "dpo": [
        Setting("dpo", 4e-4, {"beta": 200}),
        Setting("dpo", 4e-4, {"beta": 500}),
        Setting("dpo", 2e-4, {"beta": 500}),
        Setting("dpo", 2e-4, {"beta": 2000}),
    ],
    "ipo": [
        Setting("ipo", 4e-4, {"beta": 50}),
        Setting("ipo", 4e-4, {"beta": 200}),
        Setting("ipo", 4e-4, {"beta": 500}),
    ],
    "hinge": [Setting("hinge", 4e-4, {"beta": 200}), Setting("hinge", 4e-4, {"beta": 500})],
    "dmpo": [Setting("dmpo", 4e-4, {"beta": 500}), Setting("dmpo", 4e-4, {"beta": 200})],
    "poly": [
        Setting("poly", 4e-4, {"beta": 200}),
        Setting("poly", 4e-4, {"beta": 500}),
        Setting("poly", 4e-4, {"beta": 500, "poly_weight": 4}),
    ],
    "alpha": [
        Setting("alpha", 4e-4, {"beta": 200}),
        Setting("alpha", 4e-4, {"beta": 500}),
        Setting("alpha", 8e-4, {"beta": 500}),
    ],
    "linear": [
        Setting("linear", 4e-4, {"beta": 50}),
        Setting("linear", 4e-4, {"beta": 200}),
        Setting("linear", 4e-4, {"beta": 500}),
        Setting("linear", 2e-4, {"beta": 500}),
    ],
    "sdpo": [
        Setting("sdpo", 4e-4, {"beta": 200}),
        Setting("sdpo", 4e-4, {"beta": 500}),
        Setting("sdpo", 8e-4, {"beta": 500}),
    ],
    "kto": [
        Setting("kto", 4e-4, {"beta": 200}),
        Setting("kto", 4e-4, {"beta": 500}),
        Setting("kto", 4e-4, {"beta": 2000}),
    ],
    "mapo": [Setting("mapo", 4e-4, {"ratio_weight": 0.1}), Setting("mapo", 4e-4, {"ratio_weight": 1})],
    "orpo": [Setting("orpo", 8e-4, {"ratio_weight": 1}), Setting("orpo", 8e-4, {"ratio_weight": 0.1})],
    "dspo": [
        Setting("dspo", 8e-4, {"beta": 500, "shift": 0.05}),
        Setting("dspo", 8e-4, {"beta": 500, "shift": 0.5}),
    ],
}


@dataclass(frozen=True)
class Run:
    """One training and the evaluation of what it left. setting None: the base, untrained."""

    setting: Setting | None
    seed: int
    steps: int
    seeds_per_prompt: int = SEEDS_PER_PROMPT

    @property
    def name(self) -> str:
        if self.setting is None:
            return f"{BASE}_{self.seeds_per_prompt}"
        options = "".join(f"_{name}={value}" for name, value in self.setting.options.items())
        return f"{self.setting.objective}{options}_rate={self.setting.learning_rate:g}_{self.steps}_seed={self.seed}"


# ---- one run, in its own process ----


def perform(run: Run, folder: Path) -> None:
    """Train, draw and judge; leaves folder/NAME.json, the last of all. Images without numbers count as failed."""
    import torch

    from ds_dpo.evaluation.drawing.model_folder import find_model, load_pipeline
    from ds_dpo.evaluation.drawing.sampling import draw_images
    from ds_dpo.evaluation.miniature.report import diversity, judge
    from ds_dpo.miniature.world import TEST_PROMPTS

    pipeline = load_pipeline(find_model(BASE_MODEL, base=None))
    figures: dict[str, Any] = {"run": asdict(run), "commit": commit()}
    if run.setting is not None:
        figures["movement"] = train(run, folder)
        load_trained(pipeline.unet, folder / run.name)
    prompts = [prompt for prompt in TEST_PROMPTS for _ in range(run.seeds_per_prompt)]
    images = draw_images(
        pipeline,
        prompts,
        list(range(FIRST_SEED, FIRST_SEED + len(prompts))),
        num_inference_steps=20,
        guidance_scale=1.0,
        resolution=32,
        images_at_once=48,
    )
    is_finite = bool(torch.isfinite(images).all())
    figures |= {"failed": not is_finite, "prompts": prompts}
    if is_finite:
        judged = judge(images, prompts)
        figures |= {name: values.double().tolist() for name, values in vars(judged.found).items()}
        figures["diversity"] = diversity(judged.images, prompts)
    unfinished = folder / f"{run.name}.partial"
    unfinished.write_text(json.dumps(figures), encoding="utf-8")
    unfinished.rename(folder / f"{run.name}.json")
    shutil.rmtree(folder / run.name / "checkpoints", ignore_errors=True)


def train(run: Run, folder: Path) -> dict[str, float]:
    """Train as a user would; returns the means of MOVEMENTS over the last steps, where the objective has them."""
    from ds_dpo.train import main as train_main

    assert run.setting is not None
    options = {
        **COMMON,
        "data.cache": folder / "cache",
        "output_dir": folder / run.name,
        "seed": run.seed,
        "max_train_steps": run.steps,
        "cadence.save_every_steps": run.steps,
        "optimizer.learning_rate": run.setting.learning_rate,
        "objective.type": run.setting.objective,
        **{f"objective.{name}": value for name, value in run.setting.options.items()},
    }
    train_main([f"--{name}={value}" for name, value in options.items()])
    lines = (folder / run.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-MOVEMENT_STEPS:]
    steps = [json.loads(line) for line in lines]
    return {name: sum(step[name] for step in steps) / len(steps) for name in MOVEMENTS if name in steps[0]}


def load_trained(unet: Any, run_folder: Path) -> None:
    """Put the newest checkpoint's fp32 master weights into a UNet."""
    from ds_dpo.zero_shards.reader import open_checkpoint

    (folder,) = (run_folder / "checkpoints").glob("step_*")
    checkpoint = open_checkpoint(folder)
    unet.load_state_dict({name: checkpoint.read(name) for name in checkpoint.parameters})


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


# ---- all runs ----


def perform_all(runs: Sequence[Run], folder: Path, *, jobs: int) -> None:
    """Perform what is not done yet, each in a process; exits naming those that failed, after the others."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not (folder / f"{run.name}.json").exists()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    if not waiting:
        return
    os.environ.update(ENVIRONMENT)
    if not (folder / "cache").exists():
        make_cache(folder)
    processes = multiprocessing.get_context("forkserver")
    # their import takes seconds, so it is done once
    processes.set_forkserver_preload(["ds_dpo.training.assembly", "ds_dpo.evaluation.miniature.compare"])
    with processes.Pool(jobs, maxtasksperchild=1) as pool:
        failed = [name for name in pool.imap(partial(perform_logged, folder=folder), waiting, chunksize=1) if name]
    if failed:
        sys.exit(f"failed, see their .log in {folder}: {', '.join(failed)}")


def perform_logged(run: Run, folder: Path) -> str | None:
    """Perform a run with all that it prints in a file; returns its name if it failed."""
    log = os.open(folder / f"{run.name}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    own_output = os.dup(1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        perform(run, folder)
    except (Exception, SystemExit):
        traceback.print_exc()
        outcome = "failed"
    else:
        outcome = "done"
    sys.stdout.flush()
    os.write(own_output, f"{datetime.now(UTC):%H:%M:%S} {run.name}: {outcome}\n".encode())
    return None if outcome == "done" else run.name


def make_cache(folder: Path) -> None:
    """Encode the pairs once for all runs: images and prompts are the same for every seed."""
    options = [f"--{name}={value}" for name, value in {**COMMON, "output_dir": folder}.items()]
    program = [str(ROOT / "scripts" / "cache.py"), *options, "--dtype=fp32", f"--out={folder / 'cache'}"]
    subprocess.run([sys.executable, *program], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="OBJECTIVE")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--search", action="store_true", help=f"Run every candidate with seed {SEARCH_SEED}.")
    parser.add_argument("--jobs", type=int, default=2, help="Number of runs at the same time (default: 2).")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "objectives", help="Folder for the runs.")
    arguments = parser.parse_args()
    runs = searched(arguments.only) if arguments.search else reported(arguments.only, arguments.seeds)
    perform_all(runs, arguments.runs.resolve(), jobs=arguments.jobs)
    from objectives_page import write_page  # its libraries take seconds to import

    print(write_page(arguments.runs.resolve()))


BASE_RUN = Run(None, seed=0, steps=0)


def reported(objectives: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The base, then seed by seed, so that a stop leaves whole seeds."""
    return [BASE_RUN, *(Run(SETTINGS[name][0], seed, STEPS) for seed in seeds for name in objectives)]


def searched(objectives: Sequence[str]) -> list[Run]:
    return [BASE_RUN, *(Run(setting, SEARCH_SEED, STEPS) for name in objectives for setting in SETTINGS[name])]


if __name__ == "__main__":
    main()
