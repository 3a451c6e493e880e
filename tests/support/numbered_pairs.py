"""Pairs without images that know their number, a stand-in for the UNet, and caches of reference errors made of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.batch import DrawnPairs
from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.prepare import join_samples
from ds_dpo.distributed.environment import read_environment
from ds_dpo.making.make import make as make_folder
from ds_dpo.reference.cache.errors import ReferenceErrors
from ds_dpo.reference.cache.record import Coverage
from ds_dpo.reference.cache.write import ReferenceErrorsMaking

PLACE = read_environment({})
SEED = 3
PAIRS_PER_STEP = 4
LAYOUTS = {"square": (11,), "buckets": (7, 4)}


def errors_by_hand(index: int, visit: int) -> tuple[float, float]:
    return index + visit / 8, index + visit / 8 + 0.5


class NumberedPairs:
    """Pairs that know their index and visit; some are bad."""

    def __init__(self, bucket_sizes: Sequence[int], bad: Sequence[int] = ()) -> None:
        self.bucket_sizes = bucket_sizes
        self.bad = list(bad)

    def read(self, index: int, visit: int) -> DrawnPairs:
        if index in self.bad:
            raise BadRowError(f"row {index}", "torn")
        nothing = torch.zeros(1, 4, 1, 1)
        return DrawnPairs(
            chosen_time_ids=torch.tensor([[float(index)]]),
            rejected_time_ids=torch.tensor([[float(visit)]]),
            timesteps=torch.zeros(1, dtype=torch.int64),
            noise=nothing,
            chosen_posterior_noise=nothing,
            rejected_posterior_noise=nothing,
            pair_ids=torch.tensor([index]),
            target_probabilities=torch.ones(1),
            weights=torch.ones(1),
        )

    def join(self, parts: list[DrawnPairs]) -> DrawnPairs:
        return join_samples(parts)


class Computing:
    """Stands for the UNet: each pair's errors say which pair and visit it is; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __call__(self, samples: DrawnPairs) -> tuple[Tensor, Tensor]:
        places = [(int(index), int(visit)) for index, visit in zip(*self.names(samples), strict=True)]
        self.batches.append(places)
        both = torch.tensor([errors_by_hand(*place) for place in places])
        return both[:, 0], both[:, 1]

    @staticmethod
    def names(samples: DrawnPairs) -> tuple[list[float], list[float]]:
        return samples.chosen_time_ids[:, 0].tolist(), samples.rejected_time_ids[:, 0].tolist()


def make(
    out: Path,
    pairs: NumberedPairs,
    *,
    steps: int | None = None,
    visits: int | None = None,
    said: list[str] | None = None,
    computing: Computing | None = None,
    **changes: Any,
) -> ReferenceErrors:
    sizes = list(pairs.bucket_sizes)
    if visits is None:
        assert steps is not None
        coverage = Coverage.of_run(steps, pairs_per_step=PAIRS_PER_STEP, bucket_sizes=sizes)
    else:
        coverage = Coverage.of_visits(visits, pairs_per_step=PAIRS_PER_STEP, bucket_sizes=sizes)
    making = ReferenceErrorsMaking(
        out=out,
        coverage=coverage,
        seed=SEED,
        pairs=pairs,
        shard_pairs=6,
        batch_pairs=3,
        fingerprint={"unet": "abc"},
        source_description="numbered pairs",
        device_name="cpu",
        workers=0,
        load=lambda: computing or Computing(),
        place=PLACE,
        say=[].append if said is None else said.append,
    )
    make_folder(replace(making, **changes))
    return ReferenceErrors(out)
