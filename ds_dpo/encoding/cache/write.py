"""Make a cache of encoded pairs on all ranks: scan, find what is distinct, encode, finish."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_dpo.data.source import PairSource
from ds_dpo.distributed.collectives import barrier, gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import on_main
from ds_dpo.encoding.cache.finish import finish, note_entry
from ds_dpo.encoding.cache.plan import Layout, Request, plan_of, stored_images
from ds_dpo.encoding.cache.record import (
    IMAGE_SHARDS,
    PROMPT_SHARDS,
    RECORD_NAME,
    CacheRecord,
    StoredImages,
    StoredText,
    read_record,
)
from ds_dpo.encoding.cache.scan import Buckets, Scan, read_scan, scan_unit
from ds_dpo.encoding.cache.unit import Encoders, load_encoders, wanted_of_places, write_images, write_prompts
from ds_dpo.errors import DataError
from ds_dpo.making.make import Finished, Units, share_of
from ds_dpo.making.progress import Progress
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replace_file

SHARE_OF_ARROW = 0.01  # at most this share of a shard's bytes is not values


@dataclass(frozen=True, kw_only=True)
class PairCacheMaking:
    """How encoded pairs are made, for `make`: scanned in units, then encoded in the same units.

    fingerprint: what training will compare. say: prints on rank 0.
    """

    request: Request
    source: PairSource
    fingerprint: Mapping[str, str]
    place: RankEnvironment
    device: torch.device
    say: Say
    kind = "cache"
    verb = "encoded"
    things = "pairs"
    subfolders = (IMAGE_SHARDS, PROMPT_SHARDS)

    @property
    def out(self) -> Path:
        return self.request.out

    @property
    def layout(self) -> Layout:
        return Layout(out=self.out, units=self.units)

    @property
    def units(self) -> Units:
        return Units(len(self.source), self.request.shard_pairs)

    @property
    def buckets(self) -> Buckets:
        return Buckets(sizes=self.source.bucket_sizes, shapes=self.source.bucket_shapes)

    @property
    def workers(self) -> int:
        return self.request.config.data.workers

    def plan(self) -> dict[str, Any]:
        """Return everything that determines the content of a shard."""
        source = self.source
        return plan_of(
            self.request,
            fingerprint=self.fingerprint,
            source=source.fingerprint,
            num_pairs=len(source),
            images=stored_images(self.request, source),
        )

    def finished(self) -> Finished[CacheRecord] | None:
        """Return the finished cache in the folder, if any; the size of its shards need not be the one asked for."""
        if not (self.out / RECORD_NAME).is_file():
            return None
        record = read_record(self.out)
        plan = plan_of(
            self.request,
            fingerprint=record.fingerprint,
            source=record.source_fingerprint,
            num_pairs=record.num_pairs,
            images=record.images,
        )
        return Finished(record=record, plan=plan)

    def missing(self) -> list[int]:
        """Return the units that are not encoded."""
        return self.layout.unencoded()

    def make_units(self, missing: Sequence[int]) -> None:
        """Scan, then encode, this rank's share of what is missing."""
        self.scan()
        if missing:
            self.encode(missing)

    def scan(self) -> None:
        """Scan this rank's share of the units that are not scanned yet."""
        own = share_of(self.place, on_main(self.layout.unscanned))
        order = self.source.file_order()
        spans = {unit: self.units.span(unit) for unit in own}
        progress = Progress("scanned", "pairs", total=sum(map(len, spans.values())), say=self.say)
        for unit, span in spans.items():
            indices = order[span.start : span.stop].tolist()
            scan_unit(self.source, indices, self.layout.scan(unit), buckets=self.buckets, workers=self.workers)
            progress.add(len(indices))
        barrier()

    def encode(self, missing: Sequence[int]) -> None:
        """Encode this rank's share of the missing units."""
        scan = read_scan([self.layout.scan(unit) for unit in range(len(self.units))], columns=("index", "prompt"))
        encoders = load_encoders(
            self.request.config.model,
            text_dtype=self.request.text_dtype,
            images=stored_images(self.request, self.source),
            images_at_once=self.request.images_at_once,
            place=self.place,
            device=self.device,
        )
        text = encoders.stored_text()
        images = encoders.images
        num_bytes = _bytes_of_units(scan, missing, self, images=images, text=text)
        on_main(lambda: self._prepare_encoding(scan, text, num_bytes=num_bytes))
        own = share_of(self.place, missing)
        num_images = sum(len(scan.images.rows_between(*self._image_places(unit))) for unit in own)
        progress = Progress("encoded", "images", total=num_images, say=self.say)
        for unit in own:
            self._encode_unit(unit, scan, encoders, text, progress)
        progress.say_sum()
        # a distinct prompt is encoded once, by one rank
        num_cut = sum(gather_objects(len(encoders.text.cut_prompts)))
        if num_cut:
            self.say(
                f"{num_cut} of the distinct prompts encoded now are longer than the text encoder reads; the ends "
                "of these have no effect"
            )

    def finish(self) -> CacheRecord:
        """Write the tables and the record."""
        text = StoredText.model_validate_json(self._text_note.read_text(encoding="utf-8"))
        images = stored_images(self.request, self.source)
        return finish(self.layout, self.source, fingerprint=self.fingerprint, images=images, text=text)

    def _encode_unit(self, unit: int, scan: Scan, encoders: Encoders, text: StoredText, progress: Progress) -> None:
        span = self.units.span(unit)
        prompts_path, images_path = self.layout.prompts(unit), self.layout.images(unit)
        if not prompts_path.exists():
            rows = scan.prompts.rows_between(span.start + (unit > 0), span.stop + 1)  # '' comes before all pairs
            places = scan.prompts.first[rows.start : rows.stop].tolist()
            prompts = ["" if place == 0 else scan.pairs["prompt"][place - 1].as_py() for place in places]
            note_entry(self.layout, prompts_path, write_prompts(prompts_path, prompts, encoders, text))
        if not images_path.exists():
            rows = scan.images.rows_between(*self._image_places(unit))
            wanted = wanted_of_places(
                scan.images.first[rows.start : rows.stop].tolist(),
                index_of_pair=scan.pairs["index"].to_numpy(),
                keys=scan.images.keys[rows.start : rows.stop].to_pylist(),
            )
            entry = write_images(
                images_path,
                wanted,
                encoders,
                source=self.source,
                buckets=self.buckets,
                workers=self.workers,
                encoded=progress.add,
            )
            note_entry(self.layout, images_path, entry)

    def _prepare_encoding(self, scan: Scan, text: StoredText, *, num_bytes: int) -> None:
        replace_file(self._text_note, text.model_dump_json(), sync=True)
        self.say(
            f"{len(scan.images.first)} distinct images, {len(scan.prompts.first)} distinct prompts with ''; "
            f"{num_bytes / 1e9:.2f} GB still have to be written"
        )
        free = shutil.disk_usage(self.layout.out).free
        if free < num_bytes:
            raise DataError(
                f"--out {self.layout.out}: {free / 1e9:.2f} GB are free, and {num_bytes / 1e9:.2f} GB are needed; free "
                "some space, name a folder on another disk, or store less: --store mean, --dtype fp16, no --flips"
            )

    @property
    def _text_note(self) -> Path:
        return self.layout.work / "text.json"

    def _image_places(self, unit: int) -> tuple[int, int]:
        """Return the range of a unit's places among the images of the scan: its first, and the first after it."""
        span = self.units.span(unit)
        return 2 * span.start, 2 * span.stop


def _bytes_of_units(
    scan: Scan, units: Sequence[int], making: PairCacheMaking, *, images: StoredImages, text: StoredText
) -> int:
    """Estimate the bytes that the shards of these units will take."""
    shard_pairs = making.request.shard_pairs
    buckets = making.buckets
    of_bucket = np.array([images.num_bytes(shape) for shape in buckets.shapes]) * (2 if images.mirrored else 1)
    first = scan.images.first
    index = scan.pairs["index"].to_numpy()[first // 2]
    is_missing = np.isin(first // 2 // shard_pairs, units)
    prompts_missing = np.isin(np.maximum(scan.prompts.first - 1, 0) // shard_pairs, units)
    total = of_bucket[buckets.of_all(index)][is_missing].sum() + prompts_missing.sum() * text.num_bytes()
    return int(total * (1 + SHARE_OF_ARROW))
