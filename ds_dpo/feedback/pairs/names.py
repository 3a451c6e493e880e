"""The names of the files that pairs of a model's own images are in. No torch."""

from __future__ import annotations

PAIRS_NAME, RECORD_NAME = "pairs.parquet", "pairs.json"
