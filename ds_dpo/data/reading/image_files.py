"""Images that a dataset names by path: only below the dataset's folder or data.image_root, and read whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.data.images import MAX_FILE_BYTES
from ds_dpo.data.source import RawImage
from ds_dpo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class MemberBytes:
    """Where a tar's member lies in its file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the member. Raises DataError where it cannot be read whole, or is larger than MAX_FILE_BYTES."""
        if self.size > MAX_FILE_BYTES:
            raise DataError(f"{self.path} at byte {self.offset}: larger than {MAX_FILE_BYTES} bytes")
        try:
            with open(self.path, "rb") as file:
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(content) != self.size:
            raise DataError(f"{self.path} at byte {self.offset}: {len(content)} of {self.size} bytes are there")
        return content


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Finds image files by the paths that rows name. root: what relative paths start from."""

    root: Path

    def locate(self, path: str) -> Path:
        """Return the place of a path. Raises DataError where it leads out of root, or no file is there."""
        root = os.path.abspath(self.root)
        # by the letters of the path: a downloaded dataset's own files may be links to a store elsewhere
        place = os.path.normpath(os.path.join(root, path))
        if os.path.commonpath([root, place]) != root or "\0" in path:
            raise DataError(
                f"path {path!r} leads out of {root}; a path below it would fit, or set data.image_root to a folder "
                "above it"
            )
        if not os.path.isfile(place):  # a device or a pipe would never end
            raise DataError(f"path {path!r}: there is no file {place}")
        return Path(place)


def read_file(path: Path) -> bytes:
    """Return a file's bytes. Raises DataError where that fails, or it is larger than MAX_FILE_BYTES."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def raw_image(value: Any, find_file: Callable[[str], Path]) -> RawImage:
    """Return an image as the decoder takes it: what a row stores, or the bytes of the file that it names.

    Raises DataError for null, for what is no image, and for a path that has no readable file.
    """
    if isinstance(value, Mapping) and value.get("bytes") is None:
        value = value.get("path")
    if value is None:
        raise DataError("missing: the row has null instead of an image")
    if isinstance(value, MemberBytes):
        return value.read()
    if isinstance(value, str):
        return read_file(find_file(value))
    if not isinstance(value, bytes | Mapping):
        raise DataError(f"{type(value).__name__} instead of bytes, {{bytes, path}} or a path")
    return value
