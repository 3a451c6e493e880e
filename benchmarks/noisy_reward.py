"""A scorer program that is wrong on purpose: the miniature's reward plus noise, read and written as JSON lines.

    --scorer "command=python benchmarks/noisy_reward.py --seed 1 --noise 1.05"

The noise of an image is normal, drawn from a hash of the seed, the image's pixels and its prompt, so it is the same
each time. Noise of 1.05 turns the verdict on about a fifth of the miniature's pairs round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from ds_dpo.miniature.reward import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise (default: 0).")
    parser.add_argument("--noise", type=float, default=1.05, help="Standard deviation of the noise (default: 1.05).")
    arguments = parser.parse_args()
    for line in sys.stdin:
        asked = json.loads(line)
        with Image.open(asked["image"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        reward = measure(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255, [asked["prompt"]]).reward.item()
        key = f"{arguments.seed}\0{asked['prompt']}\0".encode() + pixels.tobytes()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        noise = arguments.noise * np.random.default_rng(seed).standard_normal()
        print(json.dumps({"score": reward + noise}), flush=True)


if __name__ == "__main__":
    main()
