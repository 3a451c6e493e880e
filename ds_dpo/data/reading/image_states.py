"""What image files were like when their sizes were read: an index of aspect buckets holds only while they are so."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ds_dpo.errors import DataError

# a path as rows name it -> the file's absolute path; raises DataError if there is none
FindFile = Callable[[str], Path]
NO_FILE = "no file"
# a network disk answers many questions at once
THREADS = 16
PATHS_OF_TASK = 1024


@dataclass(frozen=True, kw_only=True)
class NotedImages:
    """Finds files as find_file does, and notes the state of each, before it is read, in states, by path."""

    find_file: FindFile
    states: dict[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> Path:
        """Return a path's file. Raises DataError as find_file does."""
        self.states.setdefault(path, state_of_image(path, self.find_file))
        return self.find_file(path)


def state_of_image(path: str, find_file: FindFile) -> str:
    """Return what changes if an image is added, removed or replaced: the file's size in bytes and time of change."""
    try:
        state = os.stat(find_file(path))
    except (DataError, OSError):
        return NO_FILE
    return f"{state.st_size} {state.st_mtime_ns}"


def changed_images(states: Mapping[str, str], find_file: FindFile) -> list[str]:
    """Return the paths of images whose state is not the noted one."""

    def changed(paths: Sequence[str]) -> list[str]:
        return [path for path in paths if state_of_image(path, find_file) != states[path]]

    paths = list(states)
    tasks = [paths[start : start + PATHS_OF_TASK] for start in range(0, len(paths), PATHS_OF_TASK)]
    with ThreadPoolExecutor(THREADS) as threads:
        return [path for found in threads.map(changed, tasks) for path in found]


def is_io_error(error: BaseException | None) -> bool:
    """Return whether a disk or a right, rather than a file's content, is behind an error: it may pass."""
    while error is not None:
        # Pillow raises OSError without a number for content that it cannot decode
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__cause__
    return False
