"""Eleven small pairs, and how a cache of them is made in this process with the miniature's models."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.source import BadRowError, PairRecord
from ds_dpo.distributed.environment import read_environment
from ds_dpo.encoding.cache.fingerprint import fingerprint_of
from ds_dpo.encoding.cache.pairs import PairCache
from ds_dpo.encoding.cache.plan import Request
from ds_dpo.encoding.cache.write import PairCacheMaking
from ds_dpo.making.make import make as make_folder

PLACE = read_environment({})
CPU = torch.device("cpu")
# wide and tall images, so that cropping has something to do and mirrored crops differ
SIZES = ((40, 52), (64, 48), (37, 90), (80, 80))


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number % len(SIZES)], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class SomePairs:
    """11 pairs in two buckets of 32x32 and 32x48.

    Pairs 0 and 1 share an image and all of 0, 3, 6, 9 their prompt. Pair 4 is unreadable, 5 has a torn image and shares
    it with 7. Files lie in the order of the indices turned round.
    """

    description = "pairs of a test"
    counts: Mapping[str, int] = {"rows": 11, "pairs": 11}
    fingerprint: Mapping[str, str] = {"content": "abc"}
    bucket_sizes: Sequence[int] = (7, 4)
    bucket_shapes: Sequence[tuple[int, int]] = ((32, 32), (32, 48))

    def __len__(self) -> int:
        return 11

    def file_order(self) -> NDArray[np.int64]:
        return np.arange(11)[::-1].copy()

    def read(self, index: int) -> PairRecord:
        uid = f"row {index}"
        if index == 4:
            raise BadRowError(uid, "caption: NoneType instead of text")
        chosen, rejected = picture(2 * index), picture(2 * index + 1)
        if index == 1:
            chosen = picture(0)
        if index in (5, 7):
            rejected = picture(99)[:200]
        return PairRecord(
            prompt="a red circle" if index % 3 == 0 else f"a blue square {index}",
            chosen=chosen,
            rejected=rejected,
            pair_id=id_of(uid),
            uid=uid,
            target_probability=1.0 if index % 2 else 0.5,
            weight=1.0 + index,
        )


# 20 readable images, less the shared one of pairs 0 and 1; the torn one counts in each bucket
NUM_IMAGES = 20 - 1
NUM_BAD_IMAGES = 2
NUM_PROMPTS = 1 + 1 + 6  # '', that of pairs 0, 3, 6, 9, and those of 1, 2, 5, 7, 8, 10


def config(*options: str) -> RunConfig:
    return load_config(["--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu", *options]).config


def request(out: Path, run: RunConfig, **changes: Any) -> Request:
    asked = Request(
        config=run,
        text_dtype="fp32",
        out=out,
        quantity="moments",
        dtype="fp32",
        mirrored=run.data.flip != "off",
        shard_pairs=3,
        images_at_once=None,
    )
    return replace(asked, **changes)


def make(out: Path, run: RunConfig, said: list[str] | None = None, source: Any = None, **changes: Any) -> PairCache:
    making = PairCacheMaking(
        request=request(out, run, **changes),
        source=SomePairs() if source is None else source,
        fingerprint=fingerprint_of(run, text_dtype="fp32"),
        place=PLACE,
        device=CPU,
        say=[].append if said is None else said.append,
    )
    make_folder(making)
    return PairCache(out)
