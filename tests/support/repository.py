"""Where the repository under test is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ds_dpo"
SUPPORT = Path(__file__).resolve().parent
