"""How long a start takes to its first batch once a dataset was opened before, by the number of its rows.

    python benchmarks/second_start.py [--folder FOLDER] [--rows 1000 1000000]

Writes parquet of Pick-a-Pic's columns with small JPEG images (0.8 GB for 10^6 rows, and as much again for the copy in
Arrow), opens each set once, and then again in fresh processes, the system's file cache being warm. A process counts
from after its imports to the first micro-batch. The last line is one JSON object: `extra_seconds` is the second start
with the most rows less that with the fewest, each the least of its processes; `memory_growth_mb` what a process takes
for itself meanwhile, without the pages of mapped files, which processes share and the system takes back.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NUM_IMAGES = 200
ROWS_OF_A_GROUP = 10_000
ROWS_OF_A_FILE = 100_000
SECOND_STARTS = 5
PAIRS_OF_A_PROMPT = 14  # as in Pick-a-Pic v2: 851,293 pairs of 58,960 prompts


def main() -> None:
    """Measure, or be one measured process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Folder to write (a temporary one if unset).")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000], help="Numbers of rows.")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start is not None:
        start(arguments.start)
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="second_start_"))
    try:
        print(json.dumps(compare(folder, sorted(arguments.rows))), flush=True)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


def compare(folder: Path, sizes: list[int]) -> dict[str, object]:
    """Return the numbers of the last line."""
    images = small_images()
    first, second, memory = {}, {}, {}
    for num_rows in sizes:
        write_pairs(folder / str(num_rows), num_rows, images)
        first[num_rows] = measure(folder / str(num_rows))["seconds"]
        starts = [measure(folder / str(num_rows)) for _ in range(SECOND_STARTS)]
        second[num_rows] = min(each["seconds"] for each in starts)
        memory[num_rows] = max(each["memory_growth_mb"] for each in starts)
        print(f"{num_rows} rows: first {first[num_rows]:.2f} s, second {second[num_rows]:.3f} s", flush=True)
    return {
        "extra_seconds": round(second[sizes[-1]] - second[sizes[0]], 3),
        "second_start_seconds": {str(size): round(second[size], 3) for size in sizes},
        "first_start_seconds": {str(size): round(first[size], 2) for size in sizes},
        "memory_growth_mb": {str(size): round(memory[size], 1) for size in sizes},
    }


def measure(folder: Path) -> dict[str, float]:
    """Return what a fresh process says of its start."""
    command = [sys.executable, __file__, "--start", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def start(folder: Path) -> None:
    """Open the pairs of a folder and take the first micro-batch, as training does."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ds_dpo.config.data import DataConfig
    from ds_dpo.data.reading.open_source import open_source
    from ds_dpo.data.stream.loader import open_stream
    from ds_dpo.data.stream.prepare import OnlinePairs
    from ds_dpo.diffusion.noising import Noising

    data = DataConfig(dataset=str(folder), cache_dir=str(folder / "cache"), resolution=16, workers=0)
    before = own_megabytes()
    begin = time.perf_counter()
    source = open_source(data, say=lambda line: None)
    pairs = OnlinePairs(
        source,
        data=data,
        seed=0,
        latent_shape=lambda size: (4, size[0] // 8, size[1] // 8),
        noising=Noising.plain(1000),
    )
    stream = open_stream(
        pairs,
        data=data,
        seed=0,
        pairs_per_step=8,
        micro_batch_pairs=8,
        rank=0,
        world_size=1,
        pairs_seen=0,
        say=lambda line: None,
    )
    next(iter(stream))
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "memory_growth_mb": own_megabytes() - before}))


def own_megabytes() -> float:
    """Return the resident memory of this process that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def small_images() -> list[bytes]:
    """Return JPEG files of 16 x 16 random pixels."""
    files = []
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
        files.append(buffer.getvalue())
    return files


def write_pairs(folder: Path, num_rows: int, images: list[bytes]) -> None:
    """Write train-*.parquet of num_rows rows, every ninth a tie."""
    folder.mkdir(parents=True, exist_ok=True)
    num_files = -(-num_rows // ROWS_OF_A_FILE)
    for number in range(num_files):
        first = number * ROWS_OF_A_FILE
        rows = np.arange(first, min(first + ROWS_OF_A_FILE, num_rows))
        table = pa.table(
            {
                "caption": [f"prompt number {row // PAIRS_OF_A_PROMPT}" for row in rows],
                "jpg_0": [images[row % NUM_IMAGES] for row in rows],
                "jpg_1": [images[row * 7 % NUM_IMAGES] for row in rows],
                "label_0": np.where(rows % 9 == 0, 0.5, (rows % 2).astype(float)),
                "ranking_id": rows,
                "image_0_uid": [f"{row:032x}" for row in rows],
                "image_1_uid": [f"{row + 1:032x}" for row in rows],
            }
        )
        pq.write_table(table, folder / f"train-{number:05}-of-{num_files:05}.parquet", row_group_size=ROWS_OF_A_GROUP)


if __name__ == "__main__":
    main()
