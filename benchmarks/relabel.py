"""How relabelling scales over ranks: pairs per second of scripts/relabel.py on one rank and on two.

Makes pairs of random 64 x 64 pixel images in Pick-a-Pic's form, and a CLIP of random weights, then labels the pairs
with it, on 1 and on 2 ranks by turns. Each rank has one core: without loader processes, which would give one rank two.
A quiet machine of two cores or more is needed.

    python benchmarks/relabel.py [--pairs 20000] [--rounds 3] [--folder FOLDER]

The last line is a JSON object. scaling: median seconds of 1 rank over those of 2 ranks, of the whole program.
scaling_of_scoring: the same without start, from the line on the folder to that on the labels.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from tiny_clip import save_tiny_clip  # noqa: E402

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
SIDE = 64
ROWS_OF_A_FILE = 2000


def write_pairs(folder: Path, pairs: int) -> None:
    """Write pairs of random images, in several files."""
    generator = np.random.default_rng(0)
    for start in range(0, pairs, ROWS_OF_A_FILE):
        rows = range(start, min(start + ROWS_OF_A_FILE, pairs))
        columns = {
            "caption": [f"a picture of number {row % 997}" for row in rows],
            "jpg_0": [_image(generator) for _ in rows],
            "jpg_1": [_image(generator) for _ in rows],
            "label_0": [float(row % 2) for row in rows],
            "ranking_id": list(rows),
            "image_0_uid": [f"left {row}" for row in rows],
            "image_1_uid": [f"right {row}" for row in rows],
        }
        pq.write_table(pa.table(columns), folder / f"part-{start:08d}.parquet")


def _image(generator: np.random.Generator) -> bytes:
    small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((SIDE, SIDE)).save(buffer, "JPEG")
    return buffer.getvalue()


def seconds_of(folder: Path, clip: Path, *, ranks: int) -> tuple[float, float]:
    """Label all pairs on N ranks; returns the seconds of the whole program and of its scoring."""
    out = folder / f"labels_{ranks}"
    shutil.rmtree(out, ignore_errors=True)
    program = [
        *("scripts/relabel.py", "--config", "miniature", "--dataset", str(folder / "pairs"), "--out", str(out)),
        *("--data.workers", "0", "--data.cache_dir", str(folder / "cache"), "--scorer", f"clip={clip}"),
    ]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    command = [*(launcher if ranks > 1 else [sys.executable]), *program]
    start = time.perf_counter()
    begun = ended = start
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "making " in line:
                begun = time.perf_counter()
            if " labels of " in line:
                ended = time.perf_counter()
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {running.returncode}")
    return time.perf_counter() - start, ended - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="Number of pairs (default: 20000).")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each (default: 3).")
    parser.add_argument("--folder", type=Path, help="Folder to work in (default: a temporary one).")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        (folder / "pairs").mkdir(parents=True, exist_ok=True)
        write_pairs(folder / "pairs", arguments.pairs)
        save_tiny_clip(folder / "clip")
        found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for number in range(arguments.rounds):
            for ranks in found:
                found[ranks].append(seconds_of(folder, folder / "clip", ranks=ranks))
                whole, scoring = found[ranks][-1]
                print(f"round {number + 1}, {ranks} ranks: {whole:.1f} s, scoring {scoring:.1f} s", flush=True)
    whole, scoring = (
        {ranks: statistics.median(one[part] for one in times) for ranks, times in found.items()} for part in (0, 1)
    )
    figures = {
        "pairs": arguments.pairs,
        "load": os.getloadavg()[0],
        "seconds_1_rank": whole[1],
        "seconds_2_ranks": whole[2],
        "scaling": whole[1] / whole[2],
        "scaling_of_scoring": scoring[1] / scoring[2],
        "pairs_per_second_1_rank": arguments.pairs / scoring[1],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
