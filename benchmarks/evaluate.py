#!/usr/bin/env python
"""Measure what scripts/evaluate.py takes beyond drawing and scoring alone, on the miniature and the CPU.

    .venv/bin/python benchmarks/evaluate.py [--rounds 5] [--steps 20]

Both ways load the same two models, draw the same images in the same batches and score them by the miniature's reward.
The bare way keeps them in memory. The program also encodes, writes, records, decodes and verifies them, and writes its
report. Rounds alternate; the printed ratios are those of the medians, of seconds by the clock and of seconds of
processor time. The latter counts work that another thread does beside drawing as if it came after it, and is steadier
on a machine that does other things. The first round of both is not counted.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODEL = "ds_dpo://assets/miniature/model"
MODELS, SEEDS, BATCH, IMAGE_SIZE = 2, 8, 24, 32
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def bare_seconds(steps: int) -> float:
    """Load, draw and score, and keep nothing."""
    import torch
    from PIL import Image

    from ds_dpo.evaluation.drawing.named_model import Loading, ModelChoice, find_models, load_model
    from ds_dpo.evaluation.drawing.sampling import draw_images
    from ds_dpo.evaluation.run.request import FIRST_SEED
    from ds_dpo.evaluation.scorers.choice import read_choices
    from ds_dpo.evaluation.scorers.opening import open_scorer
    from ds_dpo.miniature.world import TEST_PROMPTS

    start = time.perf_counter()
    prompts = [prompt for prompt in TEST_PROMPTS for _ in range(SEEDS)]
    seeds = list(range(FIRST_SEED, FIRST_SEED + len(prompts)))
    loading = Loading(dtype="fp32", device=torch.device("cpu"), sampler="ddim")
    scorer = open_scorer(read_choices(["reward"])[0], "cpu")
    for found in find_models([ModelChoice(MODEL)] * MODELS, base=None, variant=None):
        pipeline = load_model(found, loading)
        images = draw_images(
            pipeline,
            prompts,
            seeds,
            num_inference_steps=steps,
            guidance_scale=1.0,
            resolution=IMAGE_SIZE,
            images_at_once=BATCH,
        )
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        scorer.score([Image.fromarray(each) for each in pixels], prompts)
    return time.perf_counter() - start


def program_seconds(steps: int) -> float:
    """Evaluate into a new folder."""
    from ds_dpo.evaluation.drawing.named_model import ModelChoice
    from ds_dpo.evaluation.run.program import evaluate
    from ds_dpo.evaluation.run.request import Request
    from ds_dpo.evaluation.scorers.choice import read_choices

    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            models=(ModelChoice(MODEL),) * MODELS,
            labels=tuple(f"model {number}" for number in range(MODELS)),
            prompts=("miniature",),
            scorers=read_choices(["reward"]),
            out=Path(folder) / "out",
            device="cpu",
            batch=BATCH,
            seeds=SEEDS,
            steps=steps,
        )
        start = time.perf_counter()
        evaluate(request, say=lambda line: None)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that count (default: 5).")
    parser.add_argument("--steps", type=int, default=20, help="Sampling steps (default: 20).")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before torch is imported
    ways = {"bare": bare_seconds, "program": program_seconds}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, measure in ways.items():
            before = time.process_time()
            found = measure(arguments.steps)
            if number:
                seconds[name].append(found)
                processor[name].append(time.process_time() - before)
                print(f"round {number}: {name} {found:.2f} s, processor {processor[name][-1]:.2f} s", flush=True)
    print(f"{MODELS} x 24 x {SEEDS} images of {IMAGE_SIZE} px, {arguments.steps} steps, load {os.getloadavg()[0]:.1f}")
    for words, of_ways in (("clock", seconds), ("processor", processor)):
        bare, program = (statistics.median(of_ways[name]) for name in ways)
        print(f"medians by {words}: bare {bare:.2f} s, program {program:.2f} s, ratio {program / bare:.3f}")


if __name__ == "__main__":
    main()
