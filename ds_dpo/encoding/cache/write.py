"""Make a cache on all ranks: scan, find what is distinct, encode, finish; a rerun goes on where the last was killed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ds_dpo.data.source import PairSource
from ds_dpo.distributed.collectives import barrier, gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import on_main
from ds_dpo.encoding.cache.finish import finish, note_entry
from ds_dpo.encoding.cache.plan import (
    Layout,
    Request,
    begin,
    is_finished,
    layout_of,
    locked,
    plan_of,
    require_same_plan,
    stored_images,
)
from ds_dpo.encoding.cache.progress import Progress
from ds_dpo.encoding.cache.record import CacheRecord, StoredImages, StoredText, read_record, replace_file
from ds_dpo.encoding.cache.scan import Buckets, Scan, read_scan, scan_unit
from ds_dpo.encoding.cache.unit import Encoders, load_encoders, wanted_of_places, write_images, write_prompts
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

SHARE_OF_ARROW = 0.01  # of a shard's bytes, at most, is not its values
T = TypeVar("T")


def write_cache(
    request: Request,
    source: PairSource,
    *,
    fingerprint: Mapping[str, str],
    place: RankEnvironment,
    device: torch.device,
    say: Say,
) -> CacheRecord:
    """Make the cache that was asked for, or go on making it; every rank of `place` calls it.

    fingerprint: what training will compare. say: prints, on rank 0. Raises DsDpoError on all ranks where the cache
    cannot be begun or finished. A rank that fails as it encodes raises alone and its launcher ends the others: the
    units that were encoded stay.
    """
    with ExitStack() as held:
        on_main(lambda: _enter(held, request))
        making = _Making(
            request=request,
            source=source,
            fingerprint=fingerprint,
            layout=layout_of(request, source),
            place=place,
            device=device,
            say=say,
        )
        finished = on_main(making.begin)
        if finished is not None:
            return finished
        making.scan()
        making.encode()
        record = on_main(making.finish)
    return record


def _enter(held: ExitStack, request: Request) -> None:
    held.enter_context(locked(request.out))


@dataclass(frozen=True, kw_only=True)
class _Making:
    request: Request
    source: PairSource
    fingerprint: Mapping[str, str]
    layout: Layout
    place: RankEnvironment
    device: torch.device
    say: Say

    @property
    def buckets(self) -> Buckets:
        return Buckets(sizes=self.source.bucket_sizes, shapes=self.source.bucket_shapes)

    @property
    def workers(self) -> int:
        return self.request.config.data.workers

    def begin(self) -> CacheRecord | None:
        """Prepare the folder, or return the record of what is finished there already."""
        plan = plan_of(self.request, self.source, fingerprint=self.fingerprint)
        if is_finished(self.layout.out):
            record = read_record(self.layout.out)
            require_same_plan(self.layout, _plan_of_record(record), {**plan, "shard_pairs": None})
            shutil.rmtree(self.layout.work, ignore_errors=True)  # a kill just before its removal leaves it
            self.say(f"{self.layout.out} is finished already; nothing is encoded")
            return record
        goes_on = begin(self.layout, plan)
        done = self.layout.num_units - len(self.layout.unencoded())
        self.say(
            f"{'going on with' if goes_on else 'making'} {self.layout.out}: {len(self.source)} pairs in "
            f"{self.layout.num_units} units of up to {self.request.shard_pairs}; {done} are encoded"
        )
        return None

    def scan(self) -> None:
        """Write what is missing of the scan, each rank its part."""
        missing = on_main(self.layout.unscanned)
        order = self.source.file_order()
        own = self._own(missing)
        progress = Progress("scanned", "pairs", total=sum(len(order[self._span(unit)]) for unit in own), say=self.say)
        for unit in own:
            indices = order[self._span(unit)].tolist()
            scan_unit(self.source, indices, self.layout.scan(unit), buckets=self.buckets, workers=self.workers)
            progress.add(len(indices))
        barrier()

    def encode(self) -> None:
        """Encode what is missing, each rank its part."""
        missing = on_main(self.layout.unencoded)
        if not missing:
            return
        scan = read_scan([self.layout.scan(unit) for unit in range(self.layout.num_units)], columns=("index", "prompt"))
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
        own = self._own(missing)
        wanted = {unit: scan.images.rows_between(2 * self._span(unit).start, 2 * self._span(unit).stop) for unit in own}
        progress = Progress("encoded", "images", total=sum(map(len, wanted.values())), say=self.say)
        for unit in own:
            self._encode_unit(unit, scan, encoders, text, progress)
        counts = np.array(gather_objects(progress.done), np.int64)
        self.say(f"encoded {counts.sum()} images in this run, on {len(counts)} ranks")

    def finish(self) -> CacheRecord:
        """Write tables and record."""
        text = StoredText.model_validate_json(self._text_note.read_text(encoding="utf-8"))
        images = stored_images(self.request, self.source)
        return finish(self.layout, self.source, fingerprint=self.fingerprint, images=images, text=text)

    def _encode_unit(self, unit: int, scan: Scan, encoders: Encoders, text: StoredText, progress: Progress) -> None:
        span = self._span(unit)
        prompts_path, images_path = self.layout.prompts(unit), self.layout.images(unit)
        if not prompts_path.exists():
            rows = scan.prompts.rows_between(span.start + (unit > 0), span.stop + 1)  # '' stands before all pairs
            places = scan.prompts.first[rows.start : rows.stop].tolist()
            prompts = ["" if place == 0 else scan.pairs["prompt"][place - 1].as_py() for place in places]
            note_entry(self.layout, prompts_path, write_prompts(prompts_path, prompts, encoders, text))
        if not images_path.exists():
            rows = scan.images.rows_between(2 * span.start, 2 * span.stop)
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
        replace_file(self._text_note, text.model_dump_json().encode())
        self.say(
            f"{len(scan.images.first)} distinct images, {len(scan.prompts.first)} distinct prompts with ''; "
            f"{num_bytes / 1e9:.2f} GB are still to be written"
        )
        free = shutil.disk_usage(self.layout.out).free
        if free < num_bytes:
            raise DataError(
                f"--out {self.layout.out}: {free / 1e9:.2f} GB are free, and {num_bytes / 1e9:.2f} GB are needed; free "
                "some, name a folder on another disk, or store less: --store mean, --dtype fp16, no --flips"
            )

    @property
    def _text_note(self) -> Path:
        return self.layout.work / "text.json"

    def _span(self, unit: int) -> slice:
        """Return which places of the file order a unit has."""
        start = unit * self.request.shard_pairs
        return slice(start, min(start + self.request.shard_pairs, len(self.source)))

    def _own(self, units: Sequence[int]) -> Sequence[int]:
        """Return this rank's part, neighbours, of units that every rank has in the same order."""
        rank, world_size = self.place.rank, self.place.world_size
        return units[len(units) * rank // world_size : len(units) * (rank + 1) // world_size]


def _bytes_of_units(
    scan: Scan, units: Sequence[int], making: _Making, *, images: StoredImages, text: StoredText
) -> int:
    """Return about how many bytes the shards of these units will take."""
    shard_pairs = making.request.shard_pairs
    buckets = making.buckets
    of_bucket = np.array([images.num_bytes(shape) for shape in buckets.shapes]) * (2 if images.mirrored else 1)
    first = scan.images.first
    index = scan.pairs["index"].to_numpy()[first // 2]
    is_missing = np.isin(first // 2 // shard_pairs, units)
    prompts_missing = np.isin(np.maximum(scan.prompts.first - 1, 0) // shard_pairs, units)
    total = of_bucket[buckets.of_all(index)][is_missing].sum() + prompts_missing.sum() * text.num_bytes()
    return int(total * (1 + SHARE_OF_ARROW))


def _plan_of_record(record: CacheRecord) -> dict[str, object]:
    return {
        "fingerprint": record.fingerprint,
        "source": record.source_fingerprint,
        "num_pairs": record.num_pairs,
        "images": record.images.model_dump(mode="json"),
        "shard_pairs": None,
    }
