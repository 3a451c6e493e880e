"""Measure the memory of ranks under ZeRO-3, from files to training: what a rank holds, and its peak while it starts.

Usage: python benchmarks/zero3_memory.py [--shape flux1|sd3] [--layers N] [--steps 2] [--ranks 2] [--folder /tmp/...]

A transformer of the shape with N layers (by default about 400 M parameters) is written in fp32 as sharded safetensors,
beside a tiny VAE and tiny text encoders. Then it is trained by ds_dpo/train.py in bf16 on the ranks of this machine's
CPUs: in full with a `zero3` reference, and as a LoRA, with
prompts of 16 tokens and images of 32 x 32 pixels. Each rank samples its anonymous memory (RssAnon of
/proc/self/status) every 5 ms. Prints a line for each case and part of the run, the larger rank's; "states" are weights,
reference, masters, moments and gradients of all ranks. The bar is states / ranks + 1.2 GB. The last line is one JSON
object. Needs 8 GB of disk, for a checkpoint at the end of each case, and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests" / "support"))

EXTRA_GB = 1.2  # of the bar: the interpreter with its libraries, activations, and layers that are whole for a moment
# so that little is whole or copied at a time; the rest are those of zero3_bf16
ZERO = {
    "stage3_max_live_parameters": 2e7,
    "stage3_max_reuse_distance": 2e7,
    "stage3_prefetch_bucket_size": 1e7,
    "reduce_bucket_size": 1e7,
    "sub_group_size": 2e7,  # what an update copies at a time, the gradients above all
}
CASES: dict[str, dict[str, object]] = {
    "full": {"reference.residency": "zero3", "optimizer.learning_rate": 1e-5},
    "lora": {"reference.residency": "adapter", "adapter.type": "lora", "adapter.rank": 16},
}
# bytes of each parameter: bf16 weights of policy and reference, then fp32 master, two moments, accumulated gradient
BYTES = {"full": (2 + 2, 4 + 8 + 4), "lora": (2, 2 + 4 + 8 + 4)}
TOKENS = 16  # of T5, so that a step takes seconds on a CPU; activations are not what is measured
LAYERS = {"flux1": 9, "sd3": 10}


def transformer_of(shape: str, layers: int) -> Any:
    """Return a random transformer of heads and widths of 1024, in fp32."""
    import tiny_flux1
    import tiny_sd3

    if shape == "sd3":
        return tiny_sd3.tiny_transformer(
            "sd35_large",
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=16,
            caption_projection_dim=1024,
        )
    return tiny_flux1.tiny_transformer(
        num_layers=layers // 3 * 2,
        num_single_layers=layers // 3 * 4,
        attention_head_dim=64,
        num_attention_heads=16,
        axes_dims_rope=(8, 28, 28),
    )


def write_pipeline(folder: Path, shape: str, layers: int) -> int:
    """Write the pipeline, its transformer in shards; return the number of the transformer's parameters."""
    import tiny_flux1
    import tiny_sd3
    import torch

    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    pipeline = tiny_flux1.tiny_flux1() if shape == "flux1" else tiny_sd3.tiny_sd3()
    torch.manual_seed(0)
    pipeline.register_modules(transformer=transformer_of(shape, layers))
    pipeline.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.numel() for parameter in pipeline.transformer.parameters())


def rank_main(out: Path, arguments: list[str]) -> None:
    """Train as one rank, and leave the peak of each part of the run, and the held memory when training begins."""
    samples: list[tuple[float, float]] = []
    parts: list[tuple[float, str]] = [(time.monotonic(), "imports")]
    threading.Thread(target=sample_forever, args=(samples,), daemon=True).start()

    from ds_dpo import train
    from ds_dpo.models.families.table import FAMILIES
    from ds_dpo.training import start

    for name, family in FAMILIES.items():
        texts = {
            key: replace(part, num_tokens=part.num_tokens and TOKENS) for key, part in family.text_encoders.items()
        }
        FAMILIES[name] = replace(family, text_encoders=texts)

    announce = start.Start.part

    def noted(self: Any, text: str) -> None:
        announce(self, text)
        parts.append((time.monotonic(), text))

    start.Start.part = noted  # type: ignore[method-assign]
    try:
        train.main(arguments)
    finally:
        ends = [when for when, _ in parts[1:]] + [time.monotonic()]
        peaks = {
            text: max((gb for at, gb in samples if began <= at < end), default=0.0)
            for (began, text), end in zip(parts, ends, strict=True)
        }
        (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peaks))


def sample_forever(samples: list[tuple[float, float]]) -> None:
    """Append (time, GB of anonymous memory) of this process every 5 ms."""
    while True:
        with open("/proc/self/status") as status:
            anonymous = next(line for line in status if line.startswith("RssAnon"))
        samples.append((time.monotonic(), int(anonymous.split()[1]) * 1024 / 1e9))
        time.sleep(0.005)


def measure(case: str, pipeline: Path, folder: Path, own: argparse.Namespace) -> dict[str, float]:
    """Train a case in a launch of its own, and return the peaks in GB, the largest of any rank."""
    settings = json.loads((ROOT / "ds_configs" / "zero3_bf16.json").read_text())
    settings["zero_optimization"] |= ZERO
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    out = folder / case
    out.mkdir()
    options: dict[str, object] = {
        "config": "miniature",
        "model.pretrained": pipeline,
        "model.family": own.shape,
        "model.gradient_checkpointing": "true",
        "deepspeed_config": folder / "deepspeed.json",
        "output_dir": out / "run",
        "max_train_steps": own.steps,
        "batch.pairs_per_step": own.ranks,
        "batch.micro_batch_pairs": 1,
        "data.max_rows": 40,
        "cadence.sample_every_steps": "none",
        "cadence.save_in_background": "false",
        **CASES[case],
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(own.ranks)]
    command += ["--master_port", str(port), __file__, "--rank_of", str(out)]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    shutil.rmtree(out / "run")
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return {part: max(rank[part] for rank in ranks) for part in ranks[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(LAYERS), default="flux1")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    own = parser.parse_args()
    folder = own.folder or Path(tempfile.mkdtemp(prefix="zero3_memory_"))
    found: dict[str, Any] = {}
    try:
        num_parameters = write_pipeline(folder / "pipeline", own.shape, own.layers or LAYERS[own.shape])
        print(f"{own.shape}: {num_parameters / 1e6:.0f} M parameters, bf16, {own.ranks} ranks", flush=True)
        for case in CASES:
            peaks = measure(case, folder / "pipeline", folder, own)
            each, trained = BYTES[case]
            states = num_parameters * (each + (trained if case == "full" else 0)) / 1e9
            bar = states / own.ranks + EXTRA_GB
            found[case] = {"states_gb": round(states, 3), "bar_gb": round(bar, 3), "peaks_gb": peaks}
            print(f"{case}: states {states:.2f} GB, bar {bar:.2f} GB a rank")
            for part, gb in peaks.items():
                print(f"  {gb:5.2f} GB  {part[:90]}", flush=True)
            print(f"  peak {max(peaks.values()):.2f} GB: {'within' if max(peaks.values()) <= bar else 'OVER'} the bar")
    finally:
        if own.folder is None:
            shutil.rmtree(folder)
    print(json.dumps({"parameters": num_parameters, **found}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank_of"]:
        rank_main(Path(sys.argv[2]), sys.argv[3:])
    elif any(argument.startswith("--local_rank") for argument in sys.argv[1:]):
        rest = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
        rank_main(Path(rest[1]), rest[2:])
    else:
        main()
