"""Look at every file of a checkpoint before anything loads it: no content may be able to run code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ds_dpo.errors import CheckpointError, cut
from ds_dpo.outside import parse_json, read_regular
from ds_dpo.storage.manifest import MAX_BYTES, Manifest
from ds_dpo.zero_shards.unpickle import load_file

PICKLES = ".pt"


def require_harmless(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError that names the first file that could run code, or that is not of its suffix's format.

    DeepSpeed's own load unpickles freely, so this must come first. Reads a pickle's instructions and no tensor. A file
    with another suffix is left alone: nothing opens it.
    """
    for name in sorted(names):
        look = LOOKS.get(Path(name).suffix)
        if look is not None:
            look(folder / name)


def require_listed(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError for a pickle in a checkpoint's folder that its manifest does not list.

    DeepSpeed finds some files by patterns.
    """
    unknown = sorted(
        {path.relative_to(folder).as_posix() for path in folder.rglob(f"*{PICKLES}")} - set(manifest.files)
    )
    if unknown:
        raise CheckpointError(f"{folder / unknown[0]}: not in the manifest; left over from another checkpoint?")


def _look_at_json(path: Path) -> None:
    try:
        parse_json(read_regular(path, max_bytes=MAX_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({cut(str(error))})") from error


def _look_at_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({cut(str(error))})") from error


LOOKS: dict[str, Callable[[Path], object]] = {
    PICKLES: load_file,
    ".json": _look_at_json,
    ".safetensors": _look_at_safetensors,
}
