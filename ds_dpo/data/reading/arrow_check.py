"""Arrow files of other programs are read in a process of their own first: a damaged one can end the process.

That happens once for a state of the files, and is noted in the cache folder.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_dpo.data.reading.rows import state_of_files
from ds_dpo.errors import DataError, cut
from ds_dpo.outside import check_regular, parse_json, read_regular

CHILD = Path(__file__).with_name("arrow_child.py")
FOLDER = "ds_dpo_checked"
MAX_STATE_BYTES = 2**26


def require_sound(saved: Path, cache_folder: Path) -> None:
    """Raise DataError that names a file of a save_to_disk folder which cannot be read, or ends who reads it.

    A file that its state.json does not list, or that is missing, is not looked at.
    """
    files = _listed_files(saved)
    if not files:
        return
    note = cache_folder / FOLDER / state_of_files(files)
    if note.exists():
        return
    _check(files)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError:
        pass  # the next start checks again


def _listed_files(saved: Path) -> list[Path]:
    """Return the Arrow files of a saved data set, or of each saved split."""
    files: list[Path] = []
    for state in sorted([*saved.glob("state.json"), *saved.glob("*/state.json")]):
        try:
            listed = parse_json(read_regular(state, max_bytes=MAX_STATE_BYTES))["_data_files"]
            found = [state.parent / each["filename"] for each in listed]
            for path in found:
                check_regular(path)
        # `datasets` says what is wrong
        except (OSError, ValueError, TypeError, KeyError):
            continue
        files += found
    return files


def _check(files: Sequence[Path]) -> None:
    paths = "".join(f"{path}\0" for path in files).encode("utf-8", "surrogateescape")
    ended = subprocess.run(
        # -P: the program's folder holds modules of this package, which are not top-level ones
        [sys.executable, "-P", str(CHILD)],
        input=paths,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    lines = ended.stdout.decode("utf-8", "replace").splitlines()
    kind, _, text = (lines[-1] if lines else "").partition(" ")
    if kind == "sound" and ended.returncode == 0:
        return
    begun = [int(line.removeprefix("at ")) for line in lines if line.startswith("at ")]
    why = text if kind == "error" else f"reading it ended a process with status {ended.returncode}"
    if not begun:
        raise DataError(f"{files[0].parent}: its Arrow files cannot be checked: python ended with {ended.returncode}")
    raise DataError(f"{files[begun[-1]]} is not a whole Arrow file ({cut(why)}); copy it or save it again")
