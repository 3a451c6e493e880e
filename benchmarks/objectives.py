#!/usr/bin/env python
"""Train the miniature with every objective over several seeds and write what each reached to docs/objectives_table.md.

    python benchmarks/objectives.py --search      the candidates of each objective, on a seed that is not reported
    python benchmarks/objectives.py               the chosen setting of each, on the seeds that are
    python benchmarks/objectives.py --only dpo sft --seeds 0
    python benchmarks/objectives.py --flow        the same on the flow miniature, in docs/objectives_flow.md

Every run has the same pairs, steps, schedule and base; objectives differ by objectives_settings.py alone. A run is one
process of one rank in fp32; --jobs of them run side by side. What is done is not done again. The page holds every run
that there is; its last section is kept as it stands. About 15 minutes on two quiet cores, and as many for the search.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from objectives_settings import FIRST, FLOW, Miniature, Setting  # noqa: E402 (beside this file)

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
    "deepspeed_config": "zero2_fp32_cpu",
    "batch.pairs_per_step": PAIRS_PER_STEP,
    "batch.micro_batch_pairs": PAIRS_PER_STEP,
    "cadence.log_every_steps": 50,
    "cadence.keep_checkpoints": 1,
    "cadence.sample_every_steps": "none",
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


def perform(run: Run, folder: Path, miniature: Miniature) -> None:
    """Train, draw and judge; leaves folder/NAME.json, the last of all. Images without numbers count as failed."""
    import torch

    from ds_dpo.evaluation.drawing.model_folder import find_model, load_pipeline
    from ds_dpo.evaluation.drawing.sampling import draw_images
    from ds_dpo.evaluation.miniature.report import diversity, judge
    from ds_dpo.miniature.world import TEST_PROMPTS

    pipeline = load_pipeline(find_model(miniature.base, base=None))
    figures: dict[str, Any] = {"run": asdict(run), "commit": commit()}
    if run.setting is not None:
        figures["movement"] = train(run, folder, miniature)
        load_trained(getattr(pipeline, miniature.denoiser), folder / run.name)
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


def train(run: Run, folder: Path, miniature: Miniature) -> dict[str, float]:
    """Train as a user would; returns the means of MOVEMENTS over the last steps, where the objective has them."""
    from ds_dpo.train import main as train_main

    assert run.setting is not None
    options = {
        **COMMON,
        "config": miniature.preset,
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


def load_trained(denoiser: Any, run_folder: Path) -> None:
    """Put the newest checkpoint's fp32 master weights into a denoiser."""
    from ds_dpo.zero_shards.reader import open_checkpoint

    (folder,) = (run_folder / "checkpoints").glob("step_*")
    checkpoint = open_checkpoint(folder)
    parameters = dict(denoiser.named_parameters())
    assert parameters.keys() == checkpoint.parameters.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(checkpoint.read(name))


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


# ---- all runs ----


def perform_all(runs: Sequence[Run], folder: Path, miniature: Miniature, *, jobs: int) -> None:
    """Perform what is not done yet, each in a process; exits naming those that failed, after the others."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not (folder / f"{run.name}.json").exists()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    if not waiting:
        return
    os.environ.update(ENVIRONMENT)
    if not (folder / "cache").exists():
        make_cache(folder, miniature)
    processes = multiprocessing.get_context("forkserver")
    # their import takes seconds, so it is done once
    processes.set_forkserver_preload(["ds_dpo.training.assembly", "ds_dpo.evaluation.miniature.compare"])
    with processes.Pool(jobs, maxtasksperchild=1) as pool:
        work = partial(perform_logged, folder=folder, miniature=miniature)
        failed = [name for name in pool.imap(work, waiting, chunksize=1) if name]
    if failed:
        sys.exit(f"failed, see their .log in {folder}: {', '.join(failed)}")


def perform_logged(run: Run, folder: Path, miniature: Miniature) -> str | None:
    """Perform a run with all that it prints in a file; returns its name if it failed."""
    log = os.open(folder / f"{run.name}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    own_output = os.dup(1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        perform(run, folder, miniature)
    except (Exception, SystemExit):
        traceback.print_exc()
        outcome = "failed"
    else:
        outcome = "done"
    sys.stdout.flush()
    os.write(own_output, f"{datetime.now(UTC):%H:%M:%S} {run.name}: {outcome}\n".encode())
    return None if outcome == "done" else run.name


def make_cache(folder: Path, miniature: Miniature) -> None:
    """Encode the pairs once for all runs: images and prompts are the same for every seed."""
    given = {**COMMON, "config": miniature.preset, "output_dir": folder}
    options = [f"--{name}={value}" for name, value in given.items()]
    program = [str(ROOT / "scripts" / "cache.py"), *options, "--dtype=fp32", f"--out={folder / 'cache'}"]
    subprocess.run([sys.executable, *program], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flow", action="store_true", help="Train the flow miniature: docs/objectives_flow.md.")
    parser.add_argument("--only", nargs="+", metavar="OBJECTIVE", help="Objectives to train (default: all).")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="Training seeds (default: 0 1 2).")
    parser.add_argument("--search", action="store_true", help=f"Run every candidate with seed {SEARCH_SEED}.")
    parser.add_argument("--jobs", type=int, default=2, help="Number of runs at the same time (default: 2).")
    parser.add_argument("--runs", type=Path, help="Folder for the runs (default: runs/objectives_PRESET).")
    arguments = parser.parse_args()
    miniature = FLOW if arguments.flow else FIRST
    only = arguments.only or list(miniature.settings)
    if unknown := set(only) - set(miniature.settings):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(miniature.settings)}")
    runs = searched(miniature, only) if arguments.search else reported(miniature, only, arguments.seeds)
    folder = (arguments.runs or ROOT / "runs" / f"objectives_{miniature.preset}").resolve()
    perform_all(runs, folder, miniature, jobs=arguments.jobs)
    from objectives_page import write_page  # its libraries take seconds to import

    print(write_page(folder, miniature))


BASE_RUN = Run(None, seed=0, steps=0)


def reported(miniature: Miniature, objectives: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The base, then seed by seed, so that a stop leaves whole seeds."""
    return [BASE_RUN, *(Run(miniature.settings[name][0], seed, STEPS) for seed in seeds for name in objectives)]


def searched(miniature: Miniature, objectives: Sequence[str]) -> list[Run]:
    settings = [setting for name in objectives for setting in miniature.settings[name]]
    return [BASE_RUN, *(Run(setting, SEARCH_SEED, STEPS) for setting in settings)]


if __name__ == "__main__":
    main()
