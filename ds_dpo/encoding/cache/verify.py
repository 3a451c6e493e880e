"""Verify a finished cache: every file's content, every row's place and values, and a few pairs encoded again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_dpo.data.images import cut_image, decode_rgb
from ds_dpo.data.source import PairSource
from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import said_once
from ds_dpo.encoding.cache.pairs import PairCache
from ds_dpo.encoding.cache.record import EMPTY_PROMPT_ROW, IMAGES, PAIRS, PROMPTS
from ds_dpo.encoding.cache.scan import SIDES
from ds_dpo.encoding.cache.shard_file import opened_shard, value_offsets
from ds_dpo.encoding.cache.unit import CutVariants, Encoders
from ds_dpo.errors import DataError
from ds_dpo.precision import torch_dtype
from ds_dpo.process.say import Say
from ds_dpo.storage.manifest import hash_file

NUM_PROBLEMS_LISTED = 20
ROWS_AT_ONCE = 2**16
# Largest allowed difference of values that are encoded again, as a share of their standard deviation. Another device,
# or other images in the same pass, change the last bits; another model or another cut changes everything.
TOLERANCE = {"fp32": 1e-2, "bf16": 0.1, "fp16": 3e-2}


def verify_files(cache: PairCache, *, place: RankEnvironment, say: Say) -> None:
    """Check every file against the record, and every row; the ranks share the shards. Every rank calls it.

    Raises DataError on every rank, listing what is wrong on any.
    """
    checks = [*_shard_checks(cache), *((name, None) for name in (PAIRS, IMAGES, PROMPTS))]
    own = checks[place.rank :: place.world_size]
    problems = [problem for name, rows in own for problem in _file_problems(cache, name, rows)]
    if place.rank == 0:
        problems += _pair_problems(cache)
    found = [problem for of_rank in gather_objects(problems) for problem in of_rank]
    if found:
        more = [f"and {len(found) - NUM_PROBLEMS_LISTED} more"] if len(found) > NUM_PROBLEMS_LISTED else []
        listed = "\n  ".join([*found[:NUM_PROBLEMS_LISTED], *more])
        raise said_once(DataError(f"{cache.folder} is damaged; remove it and make it again:\n  {listed}"))
    say(
        f"{len(cache.record.files)} files have their checksums; {cache.record.num_images} images and "
        f"{cache.record.num_prompts} prompts are finite and are where the tables say; "
        f"{cache.record.num_pairs} pairs point to them"
    )


@dataclass(frozen=True, kw_only=True)
class _ShardRows:
    """What a table says about a shard, by column. columns: offset of each row. num_bytes: size of each row's value."""

    columns: dict[str, np.ndarray]
    num_bytes: dict[str, np.ndarray]
    dtype: torch.dtype


def _shard_checks(cache: PairCache) -> Iterator[tuple[str, _ShardRows]]:
    record = cache.record
    images, prompts = np.load(cache.folder / IMAGES, mmap_mode="r"), np.load(cache.folder / PROMPTS, mmap_mode="r")
    per_bucket = np.array([record.images.num_bytes(shape) for shape in record.bucket_shapes])
    for shard, name in enumerate(record.image_shards):
        rows = images[images["shard"] == shard]
        sizes = per_bucket[rows["bucket"]]
        columns = {column: rows[column] for column in ("moments", "mirrored")}
        yield name, _ShardRows(columns=columns, num_bytes=dict.fromkeys(columns, sizes), dtype=_dtype(cache, "images"))
    item = torch_dtype(record.text.dtype).itemsize
    states_bytes, pooled_bytes = int(np.prod(record.text.states_shape)) * item, (record.text.pooled_width or 0) * item
    for shard, name in enumerate(record.prompt_shards):
        rows = prompts[prompts["shard"] == shard]
        sizes = {
            "text_states": np.full(len(rows), states_bytes),
            "pooled": np.full(len(rows), pooled_bytes),
        }
        columns = {column: rows[column] for column in sizes}
        yield name, _ShardRows(columns=columns, num_bytes=sizes, dtype=_dtype(cache, "text"))


def _dtype(cache: PairCache, part: str) -> torch.dtype:
    return torch_dtype(getattr(cache.record, part).dtype)


def _file_problems(cache: PairCache, name: str, rows: _ShardRows | None) -> Iterator[str]:
    path, expected = cache.folder / name, cache.record.files[name]
    found = hash_file(path)
    if (found.size, found.sha256) != (expected.size, expected.sha256):
        yield f"{path}: its content differs from the record's SHA-256"
        return
    if rows is None:
        return
    try:
        for column, offsets in rows.columns.items():
            if not np.array_equal(value_offsets(path, column), offsets):
                yield f"{path}: column {column} is not where the tables say"
            yield from _value_problems(cache, name, column, rows)
    except DataError as error:
        yield str(error)


def _value_problems(cache: PairCache, name: str, column: str, rows: _ShardRows) -> Iterator[str]:
    path, row = cache.folder / name, 0
    with opened_shard(path) as (_, reader):
        for number in range(reader.num_record_batches):
            for value in reader.get_batch(number).column(column):
                content = value.as_buffer()
                if content is not None:
                    if content.size != rows.num_bytes[column][row]:
                        yield f"{path}: row {row} has {content.size} bytes of {column}"
                    elif not torch.frombuffer(bytearray(content), dtype=rows.dtype).isfinite().all():
                        yield f"{path}: row {row} has {column} that are not finite"
                row += 1


def _pair_problems(cache: PairCache) -> Iterator[str]:
    """Yield a line for each pair that points to rows that do not exist or hold nothing."""
    record = cache.record
    pairs, images = np.load(cache.folder / PAIRS, mmap_mode="r"), np.load(cache.folder / IMAGES, mmap_mode="r")
    lengths = {PAIRS: (len(pairs), record.num_pairs), IMAGES: (len(images), record.num_images)}
    lengths[PROMPTS] = (len(cache.prompts), record.num_prompts)
    wrong = [
        f"{name} has {found} rows, the record says {said}" for name, (found, said) in lengths.items() if found != said
    ]
    if wrong:
        yield from wrong
        return
    stored = [column for column in ("moments", "mirrored") if column == "moments" or record.images.mirrored]
    ends = np.cumsum(record.bucket_sizes)
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        part = np.array(pairs[start : start + ROWS_AT_ONCE])
        is_bad = part["bad"] >= 0
        fits = part["bucket"] == np.searchsorted(ends, np.arange(start, start + len(part)), side="right")
        fits &= is_bad | ((part["prompt"] >= EMPTY_PROMPT_ROW) & (part["prompt"] < record.num_prompts))
        for side in SIDES:
            inside = (part[side] >= 0) & (part[side] < len(images))
            rows = images[np.where(inside, part[side], 0)]
            holds = np.logical_and.reduce([rows[column] >= 0 for column in stored]) & (rows["bucket"] == part["bucket"])
            fits &= is_bad | (inside & holds)
        for index in np.flatnonzero(~fits).tolist():
            yield f"{PAIRS}: pair {start + index} points to rows that hold nothing for it"


def verify_pairs(
    cache: PairCache,
    source: PairSource,
    encoders: Encoders,
    *,
    num_pairs: int,
    say: Say,
) -> None:
    """Read num_pairs pairs of the source, evenly spread, encode them again, and compare.

    Raises DataError if the source holds other pairs, or a difference is larger than rounding.
    """
    places = np.unique(np.linspace(0, len(source) - 1, num_pairs, dtype=np.int64))
    order = source.file_order()
    largest = {"images": 0.0, "text": 0.0}
    for index in map(int, order[places]):
        pair = cache.pairs[index]
        if pair["bad"] >= 0:
            continue
        record = source.read(index)
        if record.pair_id != pair["pair_id"]:
            raise DataError(f"pair {index} of the dataset, {record.uid}, is not the one in the cache")
        for side in SIDES:
            image = cache.images[int(pair[side])]
            again = _encode(getattr(record, side), cache.record.bucket_shapes[pair["bucket"]], encoders, uid=record.uid)
            for is_mirrored, values in enumerate(again):
                difference = _difference(cache.image(image, is_mirrored=bool(is_mirrored)), values)
                largest["images"] = max(largest["images"], difference)
        encoded = encoders.text.encode([record.prompt])
        states, _ = cache.prompt(cache.prompts[int(pair["prompt"])])
        largest["text"] = max(largest["text"], _difference(states, encoded.text_states[0].cpu()))
    coarsest = max(cache.record.images.dtype, cache.record.images.vae_dtype, key=TOLERANCE.__getitem__)
    for part, tolerance in (("images", TOLERANCE[coarsest]), ("text", TOLERANCE[cache.record.text.dtype])):
        if largest[part] > tolerance:
            raise DataError(
                f"{cache.folder}: encoded again, {part} differ by {largest[part]:.2g} of their deviation, which is "
                "more than rounding; make the cache again"
            )
    say(
        f"{len(places)} pairs encoded again: latents differ by up to {largest['images']:.2g}, text by "
        f"{largest['text']:.2g} of their deviation"
    )


def _encode(raw: object, shape: tuple[int, int], encoders: Encoders, *, uid: str) -> Sequence[Tensor]:
    image = decode_rgb(raw)  # type: ignore[arg-type]
    flips = (False, True) if encoders.images.mirrored else (False,)
    cuts = [cut_image(image, size=shape, is_flipped=flip, crop_fractions=None) for flip in flips]
    variants = torch.stack([cut.pixels for cut in cuts])
    (encoded,) = encoders.encode_variants([CutVariants(key=b"", uid=uid, variants=variants)])
    return list(encoded)


def _difference(stored: Tensor, again: Tensor) -> float:
    return float((stored.float() - again.float()).abs().max() / again.float().std())
