"""Start SDXL's whole UNet of 2.57 billion seeded weights as a user does, train LoRA steps, resume, export, load.

Usage: python benchmarks/full_size_step.py [--pixels 256] [--cases zero1_file zero3_folder ...] [--folder ...]
       python benchmarks/full_size_step.py --scale small --pixels 64      the same way with narrow layers, in minutes

Each case is a ZeRO stage and a form of the model (one file, or a diffusers folder), in bf16 with one pair a step. It
trains 3 steps and saves, resumes and trains a 4th, exports the LoRA, and loads it into diffusers. Each part is a
process of its own and prints a JSON line with its seconds and the largest resident memory of its process tree. It ends
with status 1 if the first loss is not ln 2, if policy and reference differ by anything, or if a part takes 20 GB.

The full scale needs 21 GB of free memory and 12 GB of disk. A processor without AVX-512 computes bf16 convolutions at
about 1 GFLOP/s a core: a step at 256 pixels then takes about half an hour, at 64 pixels two minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCALES = {"full": 1.0, "small": 0.2}
# Places of the model in the folder of all, as full_size_models.py writes them.
FORMS = {"file": "sdxl.safetensors", "folder": "sdxl"}
CASES = {f"zero{stage}_{form}": (stage, form) for form in FORMS for stage in (1, 3)}
STEPS, RESUMED_STEPS = 3, 4
MOST_GB = 20.0
FREE_GB = 21.0
SAMPLE_SECONDS = 0.2
LOAD = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
pipeline.load_lora_weights(sys.argv[2])
ups = {name: value for name, value in pipeline.unet.named_parameters() if ".lora_B." in name}
changed = sum(bool(value.any()) for value in ups.values())
print(len(ups), changed)
assert ups and changed == len(ups), "every layer of the LoRA has been trained"
"""


def run_file(case: str, folder: Path, *, pixels: int) -> dict[str, Any]:
    """Return the run's configuration: the preset for LoRAs, one pair a step."""
    stage, form = CASES[case]
    return {
        "base": "sdxl_pickapic_lora",
        "output_dir": str(folder / case),
        "deepspeed_config": f"zero{stage}_bf16",
        "max_train_steps": STEPS,
        "model": {"pretrained": str(folder / FORMS[form]), "vae": None, "vae_dtype": "fp32"},
        "data": {
            "dataset": str(folder / "pairs" / "pairs.csv"),
            "format": "manifest",
            "resolution": pixels,
            "workers": 1,
        },
        # large enough that bf16 shows the updates of three steps
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"pairs_per_step": 1, "micro_batch_pairs": 1},
        "cadence": {"log_every_steps": 1, "save_every_steps": STEPS, "sample_every_steps": None},
    }


def measured(case: str, part: str, command: Sequence[str]) -> str:
    """Run a part, print its line and return its output; end the program if it fails or takes too much memory."""
    began, peak = time.perf_counter(), 0.0
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=subprocess.STDOUT)
        stop = threading.Event()
        peaks: list[float] = [0.0]
        sampler = threading.Thread(target=sample, args=(process.pid, peaks, stop))
        sampler.start()
        status = process.wait()
        stop.set()
        sampler.join()
        output.seek(0)
        said = output.read()
    peak = peaks[0]
    seconds = time.perf_counter() - began
    print(
        json.dumps({"case": case, "part": part, "seconds": round(seconds, 1), "peak_gb": round(peak, 2), "rc": status}),
        flush=True,
    )
    require(status == 0, f"{case}: {part} ended with status {status}:\n{said[-3000:]}")
    require(peak < MOST_GB, f"{case}: {part} took {peak:.1f} GB, the bound is {MOST_GB:g}")
    return said


def sample(pid: int, peaks: list[float], stop: threading.Event) -> None:
    """Keep the largest sum of resident memory over a process tree, in GB; shared pages count for each process."""
    while not stop.wait(SAMPLE_SECONDS):
        peaks[0] = max(peaks[0], sum(resident_bytes(pid)) / 1e9)


def resident_bytes(pid: int) -> Iterator[int]:
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            yield process.memory_info().rss
        except psutil.NoSuchProcess:
            continue


def require(holds: bool, message: str) -> None:
    if not holds:
        raise SystemExit(message)


def run_case(case: str, folder: Path, *, pixels: int) -> None:
    """Take a case through all parts in a folder that has models and pairs."""
    run, exported, config = folder / case, folder / f"{case}_lora", folder / f"{case}.yaml"
    config.write_text(yaml.safe_dump(run_file(case, folder, pixels=pixels)))
    train = [str(ROOT / "ds_dpo" / "train.py"), "--config", str(config)]
    measured(case, "train", train)
    first, *_ = steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    compared = {name: first[name] for name in ("loss", "chosen_difference", "rejected_difference")}
    print(json.dumps({"case": case, **compared, "step_seconds": [step["step_seconds"] for step in steps]}), flush=True)
    require(abs(first["loss"] - math.log(2)) < 1e-6, f"{case}: the first loss is {first['loss']}, not ln 2")
    require(first["chosen_difference"] == first["rejected_difference"] == 0, f"{case}: policy and reference differ")
    require("largest difference 0" in (run / "log.txt").read_text(), f"{case}: the preflight says something else")
    measured(case, "resume", [*train, "--max_train_steps", str(RESUMED_STEPS)])
    require(f"resumed from step {STEPS}" in (run / "log.txt").read_text(), f"{case}: it did not resume")
    measured(case, "export", [str(ROOT / "scripts" / "consolidate.py"), str(run), str(exported), "--format", "lora"])
    # the folder has the weights of the file, and diffusers reads it without a look at the hub
    loaded = measured(case, "load in diffusers", ["-c", LOAD, str(folder / FORMS["folder"]), str(exported)])
    layers, trained = loaded.split()[-2:]
    print(json.dumps({"case": case, "lora_layers": int(layers), "trained_layers": int(trained)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full", help="Widths of the UNet; small: a fifth.")
    parser.add_argument("--pixels", type=int, default=256, help="Side of the training images, a multiple of 64.")
    cases = "ZeRO stage and form of the model."
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help=cases)
    parser.add_argument("--folder", type=Path, help="Folder in which models and runs are written and removed again.")
    options = parser.parse_args()
    free = psutil.virtual_memory().available / 1e9
    require(options.scale != "full" or free > FREE_GB, f"{free:.1f} GB of memory are free; {FREE_GB:g} are needed")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        load = {"threads": os.environ.get("OMP_NUM_THREADS"), "load": os.getloadavg()[0]}
        print(json.dumps({"scale": options.scale, "pixels": options.pixels, **load}), flush=True)
        write = [str(ROOT / "benchmarks" / "full_size_models.py"), name]
        measured("all", "write models", [*write, str(SCALES[options.scale]), str(options.pixels)])
        for case in options.cases:
            run_case(case, folder, pixels=options.pixels)


if __name__ == "__main__":
    main()
