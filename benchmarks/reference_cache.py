"""What a cached reference costs: rounding in the loss of a policy that is its reference, and time to open and read.

A cached reference brings two errors and no predictions, so that policy error - cached error is the difference of two
means that were rounded on their own, of predictions that were computed beside other images, by kernels that may be
others for another batch. This prints what is left of it where it should be 0, over pairs of the miniature:

    python benchmarks/reference_cache.py --pairs 256
    python benchmarks/reference_cache.py --rows 2553000      (851 000 pairs in 3 visits)
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from math import log
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn.functional import softplus

from ds_dpo.config.load import load_config
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.encoding.feed import build_encode, load_encoders, open_feed
from ds_dpo.making.record import write_record_file
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.precision import torch_dtype
from ds_dpo.reference.cache.errors import ReferenceErrors
from ds_dpo.reference.cache.record import ERRORS_ROW, RECORD_NAME, Coverage, ReferenceRecord
from ds_dpo.step.preference_step import squared_errors_of_pairs
from ds_dpo.storage.manifest import hash_file

BETAS = (500, 5000)
CACHED_AT_ONCE = 64  # pairs beside which the cached errors are computed
MICRO_BATCHES = (1, 2, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256, help="Number of pairs of the miniature.")
    parser.add_argument("--rows", type=int, help="Open and read a made-up table of N pair visits instead.")
    parser.add_argument("--device", default="cpu", help="Device, such as cpu or cuda.")
    parser.add_argument("--config", nargs="*", default=[], help="Further options of the run, after --config miniature.")
    asked = parser.parse_args()
    if asked.rows:
        measure_reading(asked.rows)
        return
    for precision in ("fp32", "bf16"):
        measure_rounding(precision, num_pairs=asked.pairs, device=torch.device(asked.device), options=asked.config)


def measure_rounding(precision: str, *, num_pairs: int, device: torch.device, options: list[str]) -> None:
    config = load_config(["--config", "miniature", *options]).config
    dtype = torch_dtype(precision)
    feed = open_feed(config, precision=precision, say=lambda line: None)  # type: ignore[arg-type]
    encode = build_encode(feed, load_encoders(config, dtype=dtype), model=config.model, device=device)
    order = PairOrder(feed.pairs.bucket_sizes, pairs_per_step=num_pairs, seed=config.seed)
    samples = [feed.pairs.read(*order.place(position)) for position in range(num_pairs)]
    unet = load_denoiser(config.model, dtype=dtype).to(device).requires_grad_(False)
    set_attention(unet, choose_attention(unet, config.model.attention, device=device, dtype=dtype))
    schedule = training_schedule(config.model, config.diffusion).to(device)

    def errors(at_once: int) -> Tensor:
        parts = [
            torch.stack(
                squared_errors_of_pairs(
                    unet, encode(feed.pairs.join(samples[start : start + at_once])), schedule, predict=predict_by_unet
                )
            )
            for start in range(0, num_pairs, at_once)
        ]
        return torch.cat(parts, dim=1).double().cpu()

    cached = errors(CACHED_AT_ONCE)
    smallest, largest, mean = (float(number(cached)) for number in (torch.min, torch.max, torch.mean))
    print(f"{precision} on {device}: {num_pairs} pairs, errors {smallest:.2g} to {largest:.2g}, mean {mean:.2g}")
    for at_once in MICRO_BATCHES:
        show(f"micro-batch {at_once}", errors(at_once), cached)
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    show("other kernels", errors(8), cached)


def show(name: str, policy: Tensor, cached: Tensor) -> None:
    relative = ((policy - cached) / cached).abs()
    gap = (policy[0] - cached[0]) - (policy[1] - cached[1])
    line = f"  {name:15} |policy - cached| / error: mean {relative.mean():.1e}, max {relative.max():.1e}"
    for beta in BETAS:
        off = softplus(beta / 2 * gap) - log(2)
        line += f"; beta {beta}: loss - ln 2 mean {off.mean():+.1e}, std {off.std():.1e}, max {off.abs().max():.1e}"
    print(line)


def measure_reading(num_rows: int) -> None:
    visits = 3
    num_pairs = num_rows // visits
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = np.full(visits * num_pairs, np.array((0.1, 0.2), ERRORS_ROW))
        np.save(folder / "errors.npy", rows)
        write_record_file(folder / RECORD_NAME, made_record(folder, num_pairs=num_pairs, visits=visits))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        errors = ReferenceErrors(folder)
        errors.require_covers(max_train_steps=visits * num_pairs // 2048, pairs_per_step=2048, seed=0)
        opened = time.perf_counter() - start
        places = np.random.default_rng(0).integers(0, (num_pairs, visits), (20_000, 2)).tolist()
        start = time.perf_counter()
        for index, visit in places:
            errors.read(index, visit)
        each = (time.perf_counter() - start) / len(places)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        size = (folder / "errors.npy").stat().st_size
    print(
        f"{num_pairs} pairs in {visits} visits: {size / 1e6:.1f} MB on disk; opened and found to cover its run in "
        f"{opened * 1e3:.1f} ms; {each * 1e6:.1f} us a read; memory grew by {grown / 1024:.1f} MiB"
    )


def made_record(folder: Path, *, num_pairs: int, visits: int) -> ReferenceRecord:
    return ReferenceRecord(
        fingerprint={},
        source_description="made",
        software={},
        num_pairs=num_pairs,
        bucket_sizes=[num_pairs],
        num_visits=visits,
        coverage=Coverage.of_visits(visits, pairs_per_step=2048, bucket_sizes=[num_pairs]),
        num_computed=visits * num_pairs,
        num_bad=0,
        shard_pairs=1024,
        batch_pairs=4,
        table="errors.npy",
        files={"errors.npy": hash_file(folder / "errors.npy")},
    )


if __name__ == "__main__":
    main()
