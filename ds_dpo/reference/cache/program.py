"""What scripts/cache.py --reference does on each rank: join the other ranks, then make a cache or verify one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_dpo.config.models import ModelConfig
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import gather_objects, is_main
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns, on_main, raised_everywhere, said_once
from ds_dpo.encoding.cache.program import join_ranks
from ds_dpo.encoding.feed import PairFeed, build_encode, load_encoders, open_feed
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.make import make
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.pipelines.pretrained import fetch_models
from ds_dpo.models.start import checkpoint_start, pin_start
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.precision import NEAR_ERRORS, Precision, torch_dtype
from ds_dpo.reference.cache.errors import ReferenceErrors, open_reference_errors
from ds_dpo.reference.cache.fingerprint import StartOfPolicy, fingerprint_of, start_of_policy
from ds_dpo.reference.cache.record import BAD, Coverage
from ds_dpo.reference.cache.write import Compute, ReferenceErrorsMaking
from ds_dpo.run_folder.log import RunLog
from ds_dpo.step.preference_step import share_of_error, squared_errors_of_pairs
from ds_dpo.storage.manifest import hash_file

PIXELS_AT_ONCE = 8 * 1024 * 1024  # in a forward pass: 8 images of 1024 x 1024 fill a GPU
MOST_PAIRS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What scripts/cache.py --reference was asked to make.

    visits: all pairs in this number of visits; None computes only the pair visits of the run's steps. batch_pairs:
    pairs in a forward pass; None takes default_batch_pairs.
    """

    config: RunConfig
    precision: Precision
    out: Path
    visits: int | None
    shard_pairs: int
    batch_pairs: int | None


def default_batch_pairs(resolution: int) -> int:
    """Return the pairs of a forward pass. They follow from the resolution alone, so a micro-batch changes no bit."""
    return max(1, min(MOST_PAIRS_AT_ONCE, PIXELS_AT_ONCE // (2 * resolution * resolution)))


def run(options: ReferenceOptions, *, verify: int | None) -> None:
    """Make the cache. With `verify`, check a finished one instead, and compute that many of its errors again.

    Raises DsDpoError with a message for the user.
    """
    options = replace(options, config=pin_start(options.config))
    config = options.config
    if not OBJECTIVES[config.objective.type].uses_reference:
        raise ConfigError(f"objective.type {config.objective.type} has no reference, so there is nothing to compute")
    place, device, log = join_ranks(config)
    precision = options.precision
    with node_turns(place):  # the node's first rank downloads and counts; the others find the files
        fetch_models(config.model)
        feed = open_feed(config, precision=precision, say=log.line)
    reference = _load_reference(config.model, place, dtype=torch_dtype(precision), device=device, log=log)
    ranks = _Ranks(options=options, feed=feed, reference=reference, place=place, device=device, log=log)
    if verify is None:
        ranks.make()
    else:
        ranks.verify(num_pairs=verify)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The denoiser on its device. start: on rank 0 alone, as it reads all weights."""

    denoiser: torch.nn.Module
    start: StartOfPolicy | None


def _load_reference(
    model: ModelConfig, place: RankEnvironment, *, dtype: torch.dtype, device: torch.device, log: RunLog
) -> _Reference:
    with node_turns(place):
        denoiser = load_denoiser(model, dtype=dtype, start=checkpoint_start(model))
        attention = choose_attention(denoiser, model.attention, device=device, dtype=dtype)
        set_attention(denoiser, attention)
        start = start_of_policy(denoiser, attention) if is_main() else None
        denoiser.to(device).requires_grad_(False).eval()
    log.line(attention.sentence)
    return _Reference(denoiser=denoiser, start=start)


@dataclass(frozen=True, kw_only=True)
class _Ranks:
    options: ReferenceOptions
    feed: PairFeed
    reference: _Reference
    place: RankEnvironment
    device: torch.device
    log: RunLog

    def make(self) -> None:
        options, config = self.options, self.options.config
        making = ReferenceErrorsMaking(
            out=options.out,
            coverage=self._coverage(),
            seed=config.seed,
            pairs=self.feed.pairs,
            shard_pairs=options.shard_pairs,
            batch_pairs=options.batch_pairs or default_batch_pairs(config.data.resolution),
            fingerprint=on_main(self._fingerprint),
            source_description=self.feed.description,
            device_name=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            workers=config.data.workers,
            load=self._compute,
            place=self.place,
            say=self.log.line,
        )
        make(making)
        open_reference_errors(options.out, say=self.log.line)
        self.log.line(f"train with --reference.residency cached --reference.cache {options.out}")

    def verify(self, *, num_pairs: int) -> None:
        with raised_everywhere():
            errors = open_reference_errors(self.options.out, say=self.log.line)
        on_main(lambda: self._verify_table(errors))
        if num_pairs:
            self._verify_pairs(errors, num_pairs=num_pairs)
        self.log.line(f"{self.options.out} is complete and undamaged")

    def _coverage(self) -> Coverage:
        config, visits = self.options.config, self.options.visits
        bucket_sizes = list(self.feed.pairs.bucket_sizes)
        pairs_per_step = config.batch.pairs_per_step
        if visits is not None:
            return Coverage.of_visits(visits, pairs_per_step=pairs_per_step, bucket_sizes=bucket_sizes)
        return Coverage.of_run(config.max_train_steps, pairs_per_step=pairs_per_step, bucket_sizes=bucket_sizes)

    def _fingerprint(self) -> dict[str, str]:
        start = self.reference.start
        assert start is not None, "rank 0"
        return fingerprint_of(self.options.config, self.feed, start, precision=self.options.precision)

    def _compute(self) -> Compute:
        config = self.options.config
        with node_turns(self.place):
            dtype = torch_dtype(self.options.precision)
            encoders = load_encoders(config, dtype=dtype) if self.feed.needs_encoders else None
            encode = build_encode(self.feed, encoders, model=config.model, device=self.device)
        schedule, denoiser = training_schedule(config.model, config.diffusion).to(self.device), self.reference.denoiser

        predict = FAMILIES[config.model.family].denoiser.predict

        def errors_of(samples: Any) -> tuple[Tensor, Tensor]:
            return squared_errors_of_pairs(denoiser, encode(samples), schedule, predict=predict)

        return errors_of

    def _verify_table(self, errors: ReferenceErrors) -> None:
        """Compare fingerprint, checksum and values. Raises ConfigError or DataError if they differ."""
        errors.require_fits(self._fingerprint())
        record = errors.record
        path = errors.folder / record.table
        if hash_file(path).sha256 != record.files[record.table].sha256:
            raise DataError(f"{path}: its content does not match its SHA-256, so it is damaged; make the cache again")
        rows = np.load(path, mmap_mode="r")
        is_computed = (rows["chosen"] >= 0) & (rows["rejected"] >= 0) & np.isfinite(rows["rejected"])
        counts = int(is_computed.sum()), int(((rows["chosen"] == BAD) & (rows["rejected"] == BAD)).sum())
        if counts != (record.num_computed, record.num_bad):
            raise DataError(f"{path}: {counts} computed and bad, the record says {record.num_computed, record.num_bad}")
        self.log.line(f"{record.table} has its checksum, and its {record.num_computed} errors are finite")

    def _verify_pairs(self, errors: ReferenceErrors, *, num_pairs: int) -> None:
        """Compute num_pairs pair visits again, evenly spread and shared by the ranks, and compare."""
        rows = np.load(errors.folder / errors.record.table, mmap_mode="r")
        computed = np.flatnonzero(rows["chosen"] >= 0)
        chosen = np.unique(computed[np.linspace(0, len(computed) - 1, num_pairs, dtype=np.int64)])
        errors_of = self._compute()
        largest = 0.0
        for row in chosen[self.place.rank :: self.place.world_size].tolist():
            visit, index = divmod(row, errors.record.num_pairs)
            again = torch.cat(errors_of(self.feed.pairs.read(index, visit))).cpu()
            stored = torch.tensor(errors.read(index, visit))
            largest = max(largest, float(share_of_error(again - stored, stored).max()))
        largest = max(gather_objects(largest))
        if not largest <= NEAR_ERRORS[self.options.precision]:
            error = DataError(
                f"{errors.folder}: computed again, an error has a relative difference of {largest:.2g}, more than "
                f"rounding in {self.options.precision}; make the cache again"
            )
            raise said_once(error)
        self.log.line(f"{len(chosen)} pair visits computed again: the largest relative difference is {largest:.2g}")
