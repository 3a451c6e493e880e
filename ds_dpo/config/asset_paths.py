"""Paths inside the installed package, and the ds_dpo:// names of its assets."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ds_dpo.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
ASSET_PREFIX = "ds_dpo://"


def resolve_asset(path: str) -> str:
    """Return the path of a ds_dpo:// name inside the installed package; other paths are returned unchanged."""
    if not path.startswith(ASSET_PREFIX):
        return path
    inside = PurePosixPath(path.removeprefix(ASSET_PREFIX))
    if inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(f"{path} leads out of the package; give a name such as {ASSET_PREFIX}assets/miniature/model")
    return str(PACKAGE / inside)


def is_local(name: str | None) -> bool:
    """Return whether a name is that of a file or folder on this machine, and no name of the package's own."""
    return name is not None and not name.startswith(ASSET_PREFIX) and Path(name).expanduser().exists()
