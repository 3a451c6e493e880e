"""Measure what a start on other ranks or at another ZeRO stage costs: seconds, bytes, memory, and DeepSpeed's load.

Usage: python benchmarks/resume.py [--scale 0.3] [--folder /tmp/...]

A UNet of SDXL's shape with scaled widths (0.3: 232 M parameters) is updated once in fp32 on two ranks under ZeRO-2 and
saved. Then it is resumed on the same ranks and stage, which is DeepSpeed's own load, on one rank, and on two ranks
under ZeRO-3, each in processes of their own with the files in the page cache. Prints a line for each, the slowest
rank's; the last line is one JSON object: seconds of each, and the worst growth of anonymous memory beyond the engine's
own state in MB. Needs a disk of 13 bytes and memory of about 50 bytes for each parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

SAVED_BY = (2, 2)  # ranks, ZeRO stage
RESUMED_BY = ((2, 2), (1, 2), (2, 3))
SDXL_WIDTHS, GROUPS = (320, 640, 1280), 32
TAG = "step_00000001"


def build(*, stage: int, ranks: int, scale: float) -> Any:
    """Return the project's Engine around a UNet of SDXL's blocks."""
    from diffusers import UNet2DConditionModel

    from ds_dpo.config.load import load_config
    from ds_dpo.engine.device import silence_deepspeed
    from ds_dpo.engine.engine import build_engine
    from ds_dpo.engine.settings import resolve_deepspeed

    silence_deepspeed()
    torch.manual_seed(0)
    widths = tuple(max(1, round(width * scale / GROUPS)) * GROUPS for width in SDXL_WIDTHS)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=8,
        cross_attention_dim=64,
    )
    config = load_config(
        ["--config", "miniature", "--deepspeed_config", f"zero{stage}_fp32_cpu", "--pairs_per_step", "2",
         "--micro_batch_pairs", str(2 // ranks)]
    ).config  # fmt: skip
    return build_engine(
        unet,
        settings=resolve_deepspeed(config, world_size=ranks).settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=10,
    )


def save(rank: int, ranks: int, stage: int, scale: float, folder: str) -> None:
    """Do one update and save."""
    start(rank, ranks, folder)
    engine = build(stage=stage, ranks=ranks, scale=scale)
    sample = torch.randn(1, 4, 8, 8)
    loss = engine.policy(sample, torch.tensor([1]), torch.randn(1, 4, 64)).sample.square().mean()
    engine.backward_and_step(loss)
    for file in engine.checkpoint_files(client_state={"step": 1}):
        (Path(folder) / TAG).mkdir(exist_ok=True)
        file.write(file.state, Path(folder) / TAG / file.name)
    torch.distributed.barrier()
    os._exit(0)


def resume(rank: int, ranks: int, stage: int, scale: float, folder: str, is_same: bool) -> None:
    """Load into a fresh engine and leave what it took."""
    start(rank, ranks, folder)
    engine = build(stage=stage, ranks=ranks, scale=scale)
    torch.distributed.barrier()
    began, cpu, memory = time.perf_counter(), time.process_time(), anonymous_mb()
    load = engine.read_checkpoint if is_same else engine.read_checkpoint_of_other_layout
    load(Path(folder) / TAG)
    torch.distributed.barrier()
    kept = sum(t.nbytes for state in engine._raw.optimizer.state.values() for t in state.values() if t.dim()) / 1e6
    found = [time.perf_counter() - began, time.process_time() - cpu, anonymous_mb() - memory - kept, 1.5 * kept]
    (Path(folder) / f"found_{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def start(rank: int, ranks: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles its collectives for CPUs first
    rendezvous = Path(folder) / f"rendezvous_{os.getppid()}_{time.time_ns() if ranks == 1 else ranks}"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)


def anonymous_mb() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.3, help="Factor of SDXL's widths.")
    parser.add_argument("--folder", type=Path, help="Folder in which the checkpoint is written and removed again.")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ranks, stage = SAVED_BY
        torch.multiprocessing.spawn(save, args=(ranks, stage, options.scale, folder), nprocs=ranks)
        size = sum(path.stat().st_size for path in (Path(folder) / TAG).iterdir())
        print(f"saved by {ranks} ranks under ZeRO-{stage}: {size / 1e9:.2f} GB", flush=True)
        seconds, beyond = {}, 0.0
        for ranks, stage in RESUMED_BY:
            (Path(folder) / f"rendezvous_{os.getpid()}_{ranks}").unlink(missing_ok=True)
            is_same = (ranks, stage) == SAVED_BY
            torch.multiprocessing.spawn(resume, args=(ranks, stage, options.scale, folder, is_same), nprocs=ranks)
            per_rank = [json.loads((Path(folder) / f"found_{rank}.json").read_text()) for rank in range(ranks)]
            wall, cpu, growth, read = (max(values) for values in zip(*per_rank, strict=True))
            name = f"{ranks} rank(s), ZeRO-{stage}"
            seconds[name] = round(wall, 2)
            if not is_same:
                beyond = max(beyond, growth)
            print(
                f"{name}{', by DeepSpeed' if is_same else ''}: {wall:.2f} s, CPU {cpu:.2f} s; a rank's part is "
                f"{read:.0f} MB of weights and moments, anonymous memory grew by {growth:.0f} MB beyond the moments",
                flush=True,
            )
    print(json.dumps({"seconds": seconds, "beyond_state_mb": round(beyond, 1)}))


if __name__ == "__main__":
    main()
