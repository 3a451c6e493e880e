"""Paths of what the installed package brings along, and the ds_dpo:// names of its assets."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ds_dpo.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
ASSET_PREFIX = "ds_dpo://"


def resolve_asset(path: str) -> str:
    """Return the file path of a ds_dpo:// name, which lies inside the installed package; others unchanged."""
    if not path.startswith(ASSET_PREFIX):
        return path
    inside = PurePosixPath(path.removeprefix(ASSET_PREFIX))
    if inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(f"{path} leads out of the package; such as {ASSET_PREFIX}assets/miniature/model would fit")
    return str(PACKAGE / inside)
