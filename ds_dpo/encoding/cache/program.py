"""What scripts/cache.py does on each rank: join the other ranks, then make a cache or verify one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from ds_dpo.config.run import RunConfig
from ds_dpo.data.reading.run_pairs import open_trained_on
from ds_dpo.data.source import PairSource
from ds_dpo.distributed.arithmetic import set_arithmetic
from ds_dpo.distributed.device import pick_device
from ds_dpo.distributed.environment import RankEnvironment, export_environment, read_environment
from ds_dpo.distributed.together import node_turns, raised_everywhere
from ds_dpo.encoding.cache.fingerprint import fingerprint_of
from ds_dpo.encoding.cache.pairs import open_cache
from ds_dpo.encoding.cache.plan import Request
from ds_dpo.encoding.cache.unit import load_encoders
from ds_dpo.encoding.cache.verify import verify_files, verify_pairs
from ds_dpo.encoding.cache.write import PairCacheMaking
from ds_dpo.engine.device import silence_deepspeed, start_communication
from ds_dpo.making.make import make
from ds_dpo.models.pipelines.pretrained import fetch_models
from ds_dpo.run_folder.log import RunLog

# ranks wait for the slowest one; if one dies, its launcher ends the others
LONGEST_WAIT = timedelta(days=7)


def join_ranks(config: RunConfig) -> tuple[RankEnvironment, torch.device, RunLog]:
    """Join the other ranks of this launch; returns this rank's place, its device, and a log that rank 0 prints.

    config: says how its GPU computes.
    """
    silence_deepspeed()
    place = read_environment(os.environ)
    export_environment(place)
    log = RunLog(speaks=place.rank == 0)
    picked = pick_device(place.local_rank, os.environ, needs_gpu=False)
    log.line(f"device: {picked.words}")
    log.line(set_arithmetic(allow_tf32=config.allow_tf32, deterministic=config.deterministic, environ=os.environ))
    start_communication(timeout=LONGEST_WAIT, device=picked.device)
    return place, picked.device, log


def run(request: Request, *, verify: int | None) -> None:
    """Make the cache. With `verify`, check a finished one instead, and encode that many of its pairs again.

    Raises DsDpoError with a message for the user.
    """
    place, device, log = join_ranks(request.config)
    ranks = _Ranks(request=request, place=place, device=device, log=log)
    ranks.locate_models()
    if verify is None:
        ranks.make()
    else:
        ranks.verify(num_pairs=verify)


@dataclass(frozen=True, kw_only=True)
class _Ranks:
    request: Request
    place: RankEnvironment
    device: torch.device
    log: RunLog

    def locate_models(self) -> None:
        with node_turns(self.place):  # the node's first rank downloads; the others find the files
            fetch_models(self.request.config.model)

    def make(self) -> None:
        making = PairCacheMaking(
            request=self.request,
            source=self._open_source(),
            fingerprint=self._fingerprint(),
            place=self.place,
            device=self.device,
            say=self.log.line,
        )
        make(making)
        open_cache(self.request.out, say=self.log.line)
        self.log.line(f"train with --data.cache {self.request.out}; --verify checks it")

    def verify(self, *, num_pairs: int) -> None:
        with raised_everywhere():
            cache = open_cache(self.request.out, say=self.log.line)
        cache.require_fits(self._fingerprint(), data=self.request.config.data)
        verify_files(cache, place=self.place, say=self.log.line)
        if num_pairs:
            encoders = load_encoders(
                self.request.config.model,
                text_dtype=self.request.text_dtype,
                images=cache.record.images,
                images_at_once=self.request.images_at_once,
                place=self.place,
                device=self.device,
            )
            source = self._open_source()
            with raised_everywhere():
                verify_pairs(cache, source, encoders, num_pairs=num_pairs, say=self.log.line)
        self.log.line(f"{self.request.out} is complete and undamaged")

    def _open_source(self) -> PairSource:
        with node_turns(self.place):
            return open_trained_on(self.request.config, say=self.log.line, in_file_order=True)

    def _fingerprint(self) -> dict[str, str]:
        with node_turns(self.place):
            return fingerprint_of(self.request.config, text_dtype=self.request.text_dtype)
