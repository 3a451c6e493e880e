"""How fast one core reads and collates encoded pairs at SDXL's shapes, and whether memory follows the number of rows.

Writes shards of a real cache's form with random values (4 x 128 x 128 mean and log-variance of each image, 77 x 2048
text states and 1280 pooled of each prompt, in fp16), and indices of 10^3, 10^5 and 10^6 pairs that point into them
again and again, so that a disk need not hold 10^6 pairs. Reading goes the way of training: PairCache, CachedPairs,
join, in the run's own shuffled order. The page cache is warm: the shards were read once before.

    python benchmarks/cache_read.py [--folder /tmp/cache_read] [--seconds 10]

The last line is a JSON object. pairs_per_second: without drawing noise, which is collated all the same.
pairs_per_second_with_noise: as a loader process delivers them. cpu_ms_per_pair: the processor's time of the former,
which others on the machine do not change. memory_growth_mb: the most by which resident memory, after reading 2048 pairs
of an index, exceeds that of the smallest, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, as a loader process has

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from ds_dpo.batch import CachedSamples
from ds_dpo.config.data import DataConfig
from ds_dpo.data.stream.draws import PairDraws, draw_pair
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.diffusion.noising import Noising
from ds_dpo.encoding.cache import pairs as pair_cache
from ds_dpo.encoding.cache.pairs import CachedPairs, PairCache
from ds_dpo.encoding.cache.record import (
    IMAGE_ROW,
    PAIR_ROW,
    PROMPT_ROW,
    RECORD_NAME,
    CacheRecord,
    StoredImages,
    StoredText,
)
from ds_dpo.encoding.cache.shard_file import IMAGE_SCHEMA, PROMPT_SCHEMA, new_shard, value_offsets
from ds_dpo.making.record import write_record_file
from ds_dpo.storage.manifest import FileEntry

NUM_SHARDS, IMAGES_OF_SHARD, PROMPTS_OF_SHARD = 4, 256, 128
NUM_ROWS = (10**3, 10**5, 10**6)
MICRO_BATCH_PAIRS, PAIRS_PER_STEP = 8, 2048
PAIRS_FOR_MEMORY = 2048
PIXELS = 1024
IMAGES = StoredImages(
    quantity="moments",
    dtype="fp16",
    mirrored=False,
    channels=4,
    factor=8,
    vae_dtype="fp32",
    scaling={"scaling_factor": 0.13025},
)
TEXT = StoredText(states_shape=(77, 2048), pooled_width=1280, dtype="fp16")


# ---- a cache of random values ----


def write_shards(folder: Path) -> dict[str, FileEntry]:
    """Write the shards that every index points to, and return their names and sizes."""
    random = np.random.default_rng(0)
    files = {}
    kinds = (("images", IMAGE_SCHEMA, IMAGES_OF_SHARD, _image), ("prompts", PROMPT_SCHEMA, PROMPTS_OF_SHARD, _prompt))
    for kind, schema, num_rows, row in kinds:
        (folder / kind).mkdir(parents=True)
        for shard in range(NUM_SHARDS):
            name = f"{kind}/{shard}.arrow"
            with new_shard(folder / name, schema) as written:
                for number in range(num_rows):
                    written.rows.add(row(number.to_bytes(16, "little"), random))
            files[name] = written.entry
    return files


def _image(key: bytes, random: np.random.Generator) -> dict[str, Any]:
    sizes = dict.fromkeys(("pixel_height", "pixel_width", "original_height", "original_width"), PIXELS)
    corner = {"corner_top": 0, "corner_left": 0}
    return {"key": key, "moments": _values(random, 8 * 128 * 128), "mirrored": None, **sizes, **corner, "error": None}


def _prompt(key: bytes, random: np.random.Generator) -> dict[str, Any]:
    states, pooled = _values(random, 77 * 2048), _values(random, 1280)
    return {"key": key, "prompt": key.hex(), "text_states": states, "pooled": pooled}


def _values(random: np.random.Generator, count: int) -> bytes:
    return random.standard_normal(count, dtype=np.float32).astype(np.float16).tobytes()


def write_index(folder: Path, shards: Path, files: dict[str, FileEntry], *, num_pairs: int) -> None:
    """Write an index of num_pairs pairs, each with its own rows of two images and a prompt, over the same shards."""
    folder.mkdir()
    for kind in ("images", "prompts"):
        (folder / kind).symlink_to(shards / kind)
    images = np.zeros(2 * num_pairs, IMAGE_ROW)
    images["moments"], images["shard"] = _places(shards, "images", "moments", IMAGES_OF_SHARD, 2 * num_pairs)
    images["mirrored"] = -1
    images["original_height"] = images["original_width"] = PIXELS
    prompts = np.zeros(num_pairs, PROMPT_ROW)
    prompts["text_states"], prompts["shard"] = _places(shards, "prompts", "text_states", PROMPTS_OF_SHARD, num_pairs)
    prompts["pooled"], _ = _places(shards, "prompts", "pooled", PROMPTS_OF_SHARD, num_pairs)
    pairs = np.zeros(num_pairs, PAIR_ROW)
    pairs["pair_id"] = pairs["prompt"] = np.arange(num_pairs)
    pairs["chosen"], pairs["rejected"] = 2 * np.arange(num_pairs), 2 * np.arange(num_pairs) + 1
    pairs["target_probability"] = pairs["weight"] = 1
    pairs["bad"] = -1
    for name, table in (("pairs", pairs), ("images", images), ("prompts", prompts)):
        np.save(folder / f"{name}.npy", table)
    record = CacheRecord(
        fingerprint={},
        source_description="random values",
        source_counts={},
        source_fingerprint={},
        software={},
        num_pairs=num_pairs,
        num_bad_pairs=0,
        num_images=2 * num_pairs,
        num_bad_images=0,
        num_prompts=num_pairs,
        bucket_sizes=[num_pairs],
        bucket_shapes=[(PIXELS, PIXELS)],
        images=IMAGES,
        text=TEXT,
        image_shards=[f"images/{shard}.arrow" for shard in range(NUM_SHARDS)],
        prompt_shards=[f"prompts/{shard}.arrow" for shard in range(NUM_SHARDS)],
        files=files,
    )
    write_record_file(folder / RECORD_NAME, record)


def _places(shards: Path, kind: str, column: str, of_shard: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and shard numbers of count rows, which repeat those of the shards."""
    offsets = np.concatenate([value_offsets(shards / kind / f"{shard}.arrow", column) for shard in range(NUM_SHARDS)])
    rows = np.arange(count) % len(offsets)
    return offsets[rows], rows // of_shard


# ---- reading ----


def micro_batches(folder: Path) -> Iterator[CachedSamples]:
    """Read and collate as a loader process does, in the run's order."""
    data = DataConfig(dataset="unused", prompt_dropout=0.2)
    pairs = CachedPairs(PairCache(folder), data=data, seed=0, noising=Noising.plain(1000))
    order = PairOrder(pairs.bucket_sizes, pairs_per_step=PAIRS_PER_STEP, seed=0)
    position = 0
    while True:
        places = [order.place(position + number) for number in range(MICRO_BATCH_PAIRS)]
        yield pairs.join([pairs.read(index, visit) for index, visit in places])
        position += MICRO_BATCH_PAIRS


def pairs_per_second(folder: Path, *, seconds: float) -> tuple[float, float]:
    """Return pairs a second, and milliseconds of processor time of a pair."""
    batches = micro_batches(folder)
    for _ in islice(batches, NUM_SHARDS * IMAGES_OF_SHARD // MICRO_BATCH_PAIRS):  # warms the page cache
        pass
    start, start_cpu, num_pairs = time.perf_counter(), time.process_time(), 0
    while (passed := time.perf_counter() - start) < seconds:
        num_pairs += len(next(batches).pair_ids)
    return num_pairs / passed, 1e3 * (time.process_time() - start_cpu) / num_pairs


def without_drawing() -> Any:
    """Give every pair the draws of one, so that what is measured is reading and collating."""
    drawn = draw_pair(seed=0, pair_id=0, visit=0, latent_shape=(4, 128, 128), noising=Noising.plain(1000))

    def same_draws(**options: Any) -> PairDraws:
        return drawn

    return mock.patch.object(pair_cache, "draw_pair", same_draws)


def resident_mb_after_reading(folder: Path) -> float:
    """Return resident memory, file pages included, of a process that has read some pairs."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    reader = multiprocessing.get_context("spawn").Process(target=_read_and_tell, args=(folder, there))
    reader.start()
    resident: float = here.recv()
    reader.join()
    return resident


def _read_and_tell(folder: Path, told: Any) -> None:
    with without_drawing():
        for _ in islice(micro_batches(folder), PAIRS_FOR_MEMORY // MICRO_BATCH_PAIRS):
            pass
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    told.send(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/tmp/ds_dpo_cache_read"),
        help="Folder for 0.7 GB, which is removed at the end.",
    )
    parser.add_argument("--seconds", type=float, default=10, help="Seconds of each measurement of speed.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True)
    try:
        shards = args.folder / "shards"
        files = write_shards(shards)
        for num_pairs in NUM_ROWS:
            write_index(args.folder / str(num_pairs), shards, files, num_pairs=num_pairs)
        with without_drawing():
            speed, cpu_ms = pairs_per_second(args.folder / str(NUM_ROWS[-1]), seconds=args.seconds)
        with_noise, _ = pairs_per_second(args.folder / str(NUM_ROWS[-1]), seconds=args.seconds)
        print(f"{speed:.0f} pairs/s without drawing noise, {with_noise:.0f} with it")
        resident = {num_pairs: resident_mb_after_reading(args.folder / str(num_pairs)) for num_pairs in NUM_ROWS}
        for num_pairs, megabytes in resident.items():
            print(f"{megabytes:.1f} MB resident after reading {PAIRS_FOR_MEMORY} of {num_pairs} pairs")
    finally:
        shutil.rmtree(args.folder)
    result = {
        "pairs_per_second": round(speed, 1),
        "pairs_per_second_with_noise": round(with_noise, 1),
        "cpu_ms_per_pair": round(cpu_ms, 3),
        "memory_growth_mb": round(max(resident.values()) - resident[NUM_ROWS[0]], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
