"""The scores of all pairs as a folder that all ranks make: scanned, scored in units, joined into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ds_dpo.data.source import PairSource
from ds_dpo.distributed.collectives import barrier
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import on_main
from ds_dpo.encoding.cache.scan import Buckets, scan_unit
from ds_dpo.encoding.cache.shard_file import read_columns
from ds_dpo.evaluation.scorers.opening import is_judge
from ds_dpo.evaluation.scorers.scorer import PairJudge, Scorer
from ds_dpo.feedback.relabel.scoring import ScannedPairs, column_of, judge_pairs, scanned_pairs, score_images
from ds_dpo.making.folder import work_of
from ds_dpo.making.make import Finished, Units, share_of
from ds_dpo.making.progress import Progress
from ds_dpo.making.record import RecordPart, read_record_file, write_record_file
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replacing

FORMAT = 1
RECORD_NAME, SCORES_NAME = "scores.json", "scores.parquet"
SCANNED = (
    "index",
    "pair_id",
    "uid",
    "prompt_key",
    "chosen_key",
    "rejected_key",
    "target_probability",
    "chosen_is_lower",
)
LOWER, HIGHER = "_lower", "_higher"


class ScoresRecord(RecordPart):
    """What scores.parquet holds. plan: all that determines it. higher_is_better: by scorer. judges: compare pairs."""

    format: int
    plan: dict[str, Any]
    higher_is_better: dict[str, bool]
    judges: list[str]
    pairs: int
    unreadable_pairs: int
    unscored_images: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ScoresMaking:
    """How scores of pairs are made, for `make`. say: prints on rank 0. workers: decode on each rank."""

    out: Path
    source: PairSource
    scorers: Sequence[Scorer | PairJudge]
    unit_pairs: int
    workers: int
    place: RankEnvironment
    say: Say
    kind = "set of scores"
    verb = "scored"
    things = "pairs"
    subfolders = ()

    @property
    def units(self) -> Units:
        return Units(len(self.source), self.unit_pairs)

    @property
    def rating(self) -> list[Scorer]:
        """The scorers that give each image a number."""
        return [scorer for scorer in self.scorers if not is_judge(scorer)]  # type: ignore[misc]

    @property
    def judging(self) -> list[PairJudge]:
        """The scorers that compare two images."""
        return [scorer for scorer in self.scorers if is_judge(scorer)]  # type: ignore[misc]

    def plan(self) -> dict[str, Any]:
        """Return all that determines the scores."""
        return {
            "format": FORMAT,
            "source": dict(self.source.fingerprint),
            "num_pairs": len(self.source),
            "unit_pairs": self.unit_pairs,
            "scorers": {scorer.name: dict(scorer.record) for scorer in self.scorers},
        }

    def finished(self) -> Finished[ScoresRecord] | None:
        """Return the record of scores that are there already."""
        if not (self.out / RECORD_NAME).is_file():
            return None
        record = read_scores_record(self.out)
        return Finished(record=record, plan={**record.plan, "unit_pairs": self.unit_pairs})

    def missing(self) -> list[int]:
        """Return the units that are not scored."""
        return self.units.missing(self._files)

    def make_units(self, missing: Sequence[int]) -> None:
        """Scan, then score, this rank's share of what is missing."""
        self._scan()
        if missing:
            scan = scanned_pairs(self._scan_table(SCANNED))
            own = share_of(self.place, missing)
            progress = Progress("scored", "pairs", total=sum(len(self.units.span(unit)) for unit in own), say=self.say)
            for unit in own:
                self._score(unit, scan)
                progress.add(len(self.units.span(unit)))
            progress.say_sum()
        barrier()

    def finish(self) -> ScoresRecord:
        """Join the units to scores.parquet, and write the record."""
        scan = scanned_pairs(self._scan_table((*SCANNED, "error")))
        scores = {name: values for scorer in self.rating for name, values in self._of_pairs(scorer.name, scan).items()}
        scores |= {column_of(judge.name): self._judgements(judge.name) for judge in self.judging}
        table = scan.table
        is_lower = np.asarray(table["chosen_is_lower"].fill_null(True))
        target = np.asarray(table["target_probability"], dtype=np.float64)
        is_read = np.asarray(table["error"].is_null())
        human = np.where(target == 0.5, 0.5, np.where(is_lower, 1.0, 0.0))
        columns = {
            "pair_id": table["pair_id"],
            "uid": table["uid"],
            "prompt_key": table["prompt_key"],
            "human": pa.array(human, mask=~is_read),
            **{name: pa.array(values) for name, values in scores.items()},
        }
        with replacing(self.out / SCORES_NAME, sync=True) as temporary:
            pq.write_table(pa.table(columns), temporary)
        record = ScoresRecord(
            format=FORMAT,
            plan=self.plan(),
            higher_is_better={scorer.name: scorer.higher_is_better for scorer in self.rating},
            judges=[judge.name for judge in self.judging],
            pairs=len(table),
            unreadable_pairs=int((~is_read).sum()),
            unscored_images={scorer.name: self._unscored(scorer.name) for scorer in self.rating},
        )
        write_record_file(self.out / RECORD_NAME, record)
        return record

    def _scan(self) -> None:
        own = share_of(self.place, on_main(lambda: self.units.missing(lambda unit: [self._scan_file(unit)])))
        order = self.source.file_order()
        buckets = Buckets(sizes=self.source.bucket_sizes, shapes=self.source.bucket_shapes)
        for unit in own:
            span = self.units.span(unit)
            indices = order[span.start : span.stop].tolist()
            scan_unit(self.source, indices, self._scan_file(unit), buckets=buckets, workers=self.workers)
        barrier()

    def _scan_table(self, columns: Sequence[str]) -> pa.Table:
        return pa.concat_tables([read_columns(self._scan_file(unit), columns) for unit in range(len(self.units))])

    def _score(self, unit: int, scan: ScannedPairs) -> None:
        span = self.units.span(unit)
        rows = scan.images.rows_between(2 * span.start, 2 * span.stop)
        places = scan.images.first[rows.start : rows.stop].tolist()
        scores, judged = self._scores_file(unit), self._judged_file(unit)
        if self.rating and not scores.exists():
            score_images(scores, places, scan, source=self.source, scorers=self.rating, workers=self.workers)
        if self.judging and not judged.exists():
            judge_pairs(judged, span, scan, source=self.source, judges=self.judging, workers=self.workers)

    def _of_pairs(self, name: str, scan: ScannedPairs) -> Mapping[str, NDArray[np.float64]]:
        """Return a scorer's scores of the lower and the higher image of each pair."""
        parts = [read_columns(self._scores_file(unit), ["place", column_of(name)]) for unit in range(len(self.units))]
        table = pa.concat_tables(parts)
        of_row = np.full(len(scan.images.first), np.nan)
        of_row[np.searchsorted(scan.images.first, np.asarray(table["place"]))] = np.asarray(table[column_of(name)])
        row = scan.images.row_of
        of_place = np.where(row >= 0, of_row[np.maximum(row, 0)] if len(of_row) else np.nan, np.nan)
        return {f"{column_of(name)}{LOWER}": of_place[0::2], f"{column_of(name)}{HIGHER}": of_place[1::2]}

    def _judgements(self, name: str) -> NDArray[np.float64]:
        parts = [read_columns(self._judged_file(unit), ["pair", column_of(name)]) for unit in range(len(self.units))]
        table = pa.concat_tables(parts)
        found = np.full(len(self.source), np.nan)
        found[np.asarray(table["pair"])] = np.asarray(table[column_of(name)])
        return found

    def _unscored(self, name: str) -> int:
        parts = [read_columns(self._scores_file(unit), [column_of(name)]) for unit in range(len(self.units))]
        return int(np.isnan(np.asarray(pa.concat_tables(parts)[column_of(name)])).sum())

    def _scan_file(self, unit: int) -> Path:
        return work_of(self.out) / f"scan-{unit:05d}.arrow"

    def _scores_file(self, unit: int) -> Path:
        return work_of(self.out) / f"scores-{unit:05d}.arrow"

    def _judged_file(self, unit: int) -> Path:
        return work_of(self.out) / f"judged-{unit:05d}.arrow"

    def _files(self, unit: int) -> list[Path]:
        return [
            *([self._scores_file(unit)] if self.rating else []),
            *([self._judged_file(unit)] if self.judging else []),
        ]


def read_scores_record(out: Path) -> ScoresRecord:
    """Read the record of a folder. Raises DataError if it is none."""
    return read_record_file(
        out / RECORD_NAME, ScoresRecord, format_version=FORMAT, state_without="holds no finished scores"
    )
