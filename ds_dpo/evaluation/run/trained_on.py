"""Which scorers made the labels that a model was trained on, as its run records it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ds_dpo.config.documents import read_yaml
from ds_dpo.errors import DsDpoError
from ds_dpo.evaluation.run.run_models import RUN_AT_STEP
from ds_dpo.outside import check_regular, parse_json, read_regular

CONFIG_NAME = "config.yaml"
PAIRS_RECORD_NAME = "pairs.json"  # beside the pairs that scripts/make_pairs.py makes
MAX_BYTES = 2**20
NEAREST_FOLDERS = 3  # a run folder, RUN/export, RUN/checkpoints/step_N


def recorded_scorers(names: Iterable[str]) -> list[str]:
    """Return the scorers by which models were trained that are runs or inside of one; what cannot be read has none."""
    runs = dict.fromkeys(run for name in names if (run := _run_of(name)) is not None)
    return list(dict.fromkeys(scorer for run in runs for scorer in _scorers_of(run)))


def _run_of(name: str) -> Path | None:
    match = RUN_AT_STEP.fullmatch(name)
    path = Path(name if match is None or Path(name).exists() else match["run"])
    if not path.exists():
        return None
    near = [path.absolute(), *path.absolute().parents][:NEAREST_FOLDERS]
    return next((folder for folder in near if (folder / CONFIG_NAME).is_file()), None)


def _scorers_of(run: Path) -> Iterator[str]:
    with contextlib.suppress(DsDpoError, OSError, ValueError, AttributeError, TypeError, KeyError):
        data = read_yaml(run / CONFIG_NAME, dict).get("data") or {}
        if data.get("labels"):
            yield from _of_labels(Path(data["labels"]).expanduser())
        if data.get("dataset"):
            record = Path(data["dataset"]).expanduser().parent / PAIRS_RECORD_NAME
            if record.is_file():
                yield from parse_json(read_regular(record, max_bytes=MAX_BYTES))["scorers"]


def _of_labels(path: Path) -> list[str]:
    """Return the scorers of a file of labels: the names in its column `version`, which holds the record of each."""
    import pyarrow.parquet as pq

    check_regular(path)
    with pq.ParquetFile(path) as file:
        first = next(file.iter_batches(batch_size=1, columns=["version"]), None)
    versions: Any = {} if first is None or not first.num_rows else parse_json(first["version"][0].as_py())
    return list(versions)
