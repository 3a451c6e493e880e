"""scripts/relabel.py on two ranks: two ranks write what one writes, and training takes it."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
from launching import ENVIRONMENT

from ds_dpo.config.load import load_config
from ds_dpo.data.reading.run_pairs import open_trained_on

pytestmark = pytest.mark.launch
OPTIONS = ["--config", "miniature", "--data.max_rows", "60", "--data.workers", "1"]


def relabel(out: Path, cache: Path, *, ranks: int) -> str:
    program = ["scripts/relabel.py", *OPTIONS, "--data.cache_dir", str(cache), "--out", str(out), "--unit_pairs", "7"]
    done = forked.run([*program, "--scorer", "reward", "--human", "confirm"], env=ENVIRONMENT, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_two_ranks_write_what_one_writes_and_training_reads_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    two, one = tmp_path / "two", tmp_path / "one"
    said = relabel(two, cache, ranks=2)
    relabel(one, cache, ranks=1)
    assert (two / "labels.parquet").read_bytes() == (one / "labels.parquet").read_bytes()
    assert (two / "report.json").read_bytes() == (one / "report.json").read_bytes()
    assert "scored 60 pairs in this run, on 2 ranks" in said
    assert not (two / "work").exists()

    def opened(*options: str):  # type: ignore[no-untyped-def]
        config = load_config([*OPTIONS, "--data.cache_dir", str(cache), *options]).config
        return open_trained_on(config, say=lambda line: None)

    before, after = opened(), opened("--data.labels", str(two / "labels.parquet"))
    # the miniature's labels are those of its reward, so each decided pair is confirmed, as it was
    report = json.loads((two / "report.json").read_text())
    assert report["agreement_with_human_labels"]["reward"]["accuracy"] == 1
    assert report["labels"] == len(before) == len(after)
    assert after.fingerprint == before.fingerprint
