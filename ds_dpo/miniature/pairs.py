"""Sample preference pairs from the miniature's base model, in Pick-a-Pic v2's columns and file layout."""

import hashlib
import io
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from torch import Tensor

from ds_dpo.miniature.kinds import Kind, load_parts, sample
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.world import TEST_PROMPTS, TRAIN_PROMPTS
from ds_dpo.process.say import Say

CANDIDATES = 8  # images sampled per pair; the best and the worst make the pair
PROMPTS_AT_ONCE = 24
TIE_EVERY = 12  # every 12th row is a tie, 8 %; Pick-a-Pic v2 has 11 %
JPEG_QUALITY = 92

# split: (prompts, most rows per prompt, sampling seed); as in Pick-a-Pic, the *_unique splits have one row per prompt
SPLITS = {
    "train": (TRAIN_PROMPTS, 46, 1000),
    "validation_unique": (TRAIN_PROMPTS, 1, 200_000),
    "test_unique": (TEST_PROMPTS, 1, 300_000),
}

FEATURES = Features(
    {
        "are_different": Value("bool"),
        "best_image_uid": Value("string"),
        "caption": Value("string"),
        "created_at": Value("timestamp[ns]"),
        "has_label": Value("bool"),
        "image_0_uid": Value("string"),
        "image_0_url": Value("string"),
        "image_1_uid": Value("string"),
        "image_1_url": Value("string"),
        "jpg_0": Value("binary"),
        "jpg_1": Value("binary"),
        "label_0": Value("float64"),
        "label_1": Value("float64"),
        "model_0": Value("string"),
        "model_1": Value("string"),
        "ranking_id": Value("int64"),
        "user_id": Value("int64"),
        "num_example_per_prompt": Value("int64"),
        "__index_level_0__": Value("int64"),
    }
)


def write_pairs(kind: Kind, model_folder: Path, folder: Path, *, say: Say) -> None:
    """Sample and write all splits of a miniature as folder/data/SPLIT-00000-of-00001.parquet."""
    parts = load_parts(kind, model_folder)

    def sample_base(prompts: list[str], seed: int) -> Tensor:
        return sample(parts, prompts, seed=seed)

    first_ranking = 0
    for split, (prompts, repeats, seed) in SPLITS.items():
        order = [prompt for _ in range(min(repeats, kind.rows_per_prompt)) for prompt in prompts]
        rows = list(_rows(order, sample_base, model=f"ds_dpo/{kind.name}", seed=seed, first_ranking=first_ranking))
        first_ranking += len(rows)
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=FEATURES).to_parquet(path)
        ties = sum(not row["are_different"] for row in rows)
        say(f"{path}: {len(rows)} rows, {ties} ties, {path.stat().st_size / 1e6:.2f} MB")


def _rows(
    prompts: list[str],
    sample_base: Callable[[list[str], int], Tensor],
    *,
    model: str,
    seed: int,
    first_ranking: int,
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        repeated = [prompt for prompt in part for _ in range(CANDIDATES)]
        files = [encode_jpeg(image) for image in sample_base(repeated, seed + start)]
        # scored after JPEG, as the trainer sees them
        rewards = measure(torch.stack([decode_jpeg(file) for file in files]), repeated).reward
        candidates = rewards.view(len(part), CANDIDATES)
        for offset, (prompt, of_prompt) in enumerate(zip(part, candidates, strict=True)):
            own = files[offset * CANDIDATES : (offset + 1) * CANDIDATES]
            index = first_ranking + start + offset
            tie = index % TIE_EVERY == TIE_EVERY - 1
            yield _row(prompt, own, of_prompt.tolist(), model=model, ranking_id=index, tie=tie)


def _row(
    prompt: str, files: list[bytes], rewards: list[float], *, model: str, ranking_id: int, tie: bool
) -> dict[str, Any]:
    """Return a Pick-a-Pic row: the best and the worst image, or for a tie the two with the nearest rewards."""
    ranked = sorted(range(len(files)), key=lambda index: rewards[index])
    if tie:
        worse, better = min(pairwise(ranked), key=lambda pair: rewards[pair[1]] - rewards[pair[0]])
    else:
        worse, better = ranked[0], ranked[-1]
    first_is_better = hashlib.blake2b(f"{prompt} {ranking_id}".encode()).digest()[0] % 2 == 0
    first, second = (better, worse) if first_is_better else (worse, better)
    label_0 = 0.5 if tie else float(first_is_better)
    uids = [str(uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(files[index]).hexdigest())) for index in (first, second)]
    return {
        "are_different": not tie,
        "best_image_uid": "tie" if tie else uids[0 if first_is_better else 1],
        "caption": prompt,
        "created_at": datetime(2026, 1, 1) + timedelta(seconds=ranking_id),
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": "",
        "image_1_uid": uids[1],
        "image_1_url": "",
        "jpg_0": files[first],
        "jpg_1": files[second],
        "label_0": label_0,
        "label_1": 1 - label_0,
        "model_0": model,
        "model_1": model,
        "ranking_id": ranking_id,
        "user_id": 0,
        "num_example_per_prompt": 1,
        "__index_level_0__": ranking_id,
    }


def encode_jpeg(image: Tensor) -> bytes:
    """Return the JPEG file of an image (3, S, S) in 0..1."""
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode_jpeg(file: bytes) -> Tensor:
    """Return the pixels (3, S, S) in 0..1 of a JPEG file."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1).float() / 255
