"""Write pairs as parquet in Pick-a-Pic's form, with the images themselves and the noise from which each was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ds_dpo.errors import DataError
from ds_dpo.evaluation.results import ImageRow
from ds_dpo.feedback.pairs.forming import FormedPair
from ds_dpo.outside import read_regular
from ds_dpo.storage.replace import replacing

MAX_IMAGE_BYTES = 2**28
ROWS_OF_A_GROUP = 64
PAIRS_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("ranking_id", pa.int64()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("confidence", pa.float64()),
        ("margin", pa.float64()),
        ("seed_0", pa.int64()),
        ("seed_1", pa.int64()),
        ("noise_0", pa.binary()),
        ("noise_1", pa.binary()),
    ]
)


def starting_noise(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Return the noise from which the image of a seed was drawn, (C, H, W) fp32, as evaluation.drawing does."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).numpy()


def write_pairs(path: Path, pairs: Sequence[FormedPair], *, folder: Path, noise_shape: Sequence[int]) -> None:
    """Write the pairs. folder: that of the evaluation, with the images. noise_shape: C,H,W of the models' latents.

    The chosen image is image 0 or 1 by a hash of both, so that its place says nothing. Raises DataError for an image
    that is missing or has changed.
    """
    shape = ",".join(map(str, noise_shape))
    schema = PAIRS_SCHEMA.with_metadata({"noise": f"float32, C,H,W = {shape}, little-endian"})
    with replacing(path, sync=True) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(pairs), ROWS_OF_A_GROUP):
            rows = list(_rows(pairs[start : start + ROWS_OF_A_GROUP], start, folder, noise_shape))
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _rows(
    pairs: Sequence[FormedPair], first: int, folder: Path, noise_shape: Sequence[int]
) -> Iterator[dict[str, Any]]:
    for number, pair in enumerate(pairs, start=first):
        is_chosen_first = hashlib.sha256(f"{pair.chosen.sha256} {pair.rejected.sha256}".encode()).digest()[0] % 2 == 0
        images = (pair.chosen, pair.rejected) if is_chosen_first else (pair.rejected, pair.chosen)
        row: dict[str, Any] = {
            "caption": pair.prompt,
            "label_0": float(is_chosen_first),
            "label_1": float(not is_chosen_first),
            "ranking_id": number,
            "confidence": pair.confidence,
            "margin": pair.margin,
        }
        for place, image in enumerate(images):
            row |= {
                f"jpg_{place}": _content(folder, image),
                f"image_{place}_uid": image.sha256,
                f"model_{place}": image.model,
                f"seed_{place}": image.seed,
                f"noise_{place}": starting_noise(image.seed, noise_shape).astype("<f4").tobytes(),
            }
        yield row


def _content(folder: Path, image: ImageRow) -> bytes:
    path = folder / image.path
    try:
        content = read_regular(path, max_bytes=MAX_IMAGE_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); run the same command again") from error
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise DataError(f"{path} has changed since it was scored; run the same command again")
    return content
