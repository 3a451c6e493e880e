"""How soon, and in how much memory, the loader knows the pairs of a rank's first batches: for 10**9 pairs.

Nothing is read: the pairs are their indices. The last line is one JSON object: first_batch_ms and memory_mb are the
worst of a fresh start, a start resumed at a random step, and both over nine buckets; memory is the growth of the
process after its imports. first_step_ms is the time until all of a rank's micro-batches of the first step are there.
draws_per_second: pairs that one process places and draws, noise of 4 x 128 x 128 and two posteriors included.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ds_dpo.config.data import DataConfig
from ds_dpo.data.stream.draws import draw_pair
from ds_dpo.data.stream.loader import open_stream
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.diffusion.noising import Noising

PAIRS_PER_STEP, WORLD_SIZE, MICRO_BATCH_PAIRS = 2048, 16, 8


@dataclass(frozen=True, kw_only=True)
class Indices:
    indices: Tensor
    visits: Tensor


@dataclass(frozen=True, kw_only=True)
class IndexPairs:
    """A PairReader that reads nothing."""

    bucket_sizes: Sequence[int]

    def read(self, index: int, visit: int) -> Indices:
        return Indices(indices=torch.tensor([index]), visits=torch.tensor([visit]))

    def join(self, parts: list[Indices]) -> Indices:
        return Indices(
            indices=torch.cat([part.indices for part in parts]), visits=torch.cat([part.visits for part in parts])
        )


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(bucket_sizes: Sequence[int], *, step: int) -> dict[str, float]:
    """Milliseconds from nothing to a rank's first micro-batch, and to all those of its first step."""
    start = time.perf_counter()
    stream = iter(
        open_stream(
            IndexPairs(bucket_sizes=bucket_sizes),
            data=DataConfig(dataset="none", workers=0),
            seed=0,
            pairs_per_step=PAIRS_PER_STEP,
            micro_batch_pairs=MICRO_BATCH_PAIRS,
            rank=WORLD_SIZE - 1,
            world_size=WORLD_SIZE,
            pairs_seen=step * PAIRS_PER_STEP,
            say=print,
        )
    )
    next(stream)
    first_batch = time.perf_counter()
    for _ in islice(stream, PAIRS_PER_STEP // WORLD_SIZE // MICRO_BATCH_PAIRS - 1):
        pass
    return {"first_batch_ms": 1e3 * (first_batch - start), "first_step_ms": 1e3 * (time.perf_counter() - start)}


def draws_per_second(num_pairs: int) -> float:
    order = PairOrder([num_pairs], pairs_per_step=PAIRS_PER_STEP, seed=0)
    count, start = 300, time.perf_counter()
    for position in range(count):
        index, visit = order.place(position)
        draw_pair(seed=0, pair_id=index, visit=visit, latent_shape=(4, 128, 128), noising=Noising.plain(1000))
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10**9, help="Number of pairs in the dataset.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the step to resume at and of the buckets' sizes.")
    args = parser.parse_args()

    draw = random.Random(args.seed)
    cuts = sorted(draw.sample(range(1, args.pairs), 8))
    buckets = [end - begin for begin, end in zip([0, *cuts], [*cuts, args.pairs], strict=True)]
    step = draw.randrange(10**9)  # some thousand epochs in
    before_mb = resident_mb()
    cases = {
        "fresh": measure([args.pairs], step=0),
        "resumed": measure([args.pairs], step=step),
        "fresh, 9 buckets": measure(buckets, step=0),
        "resumed, 9 buckets": measure(buckets, step=step),
    }
    memory_mb = resident_mb() - before_mb
    for name, times in cases.items():
        print(f"{name}: first batch {times['first_batch_ms']:.2f} ms, first step {times['first_step_ms']:.2f} ms")
    result = {
        "pairs": args.pairs,
        "first_batch_ms": max(times["first_batch_ms"] for times in cases.values()),
        "first_step_ms": max(times["first_step_ms"] for times in cases.values()),
        "memory_mb": memory_mb,
        "draws_per_second": draws_per_second(args.pairs),
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
