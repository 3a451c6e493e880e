"""Images that a dataset names by path: only files below its folder or data.image_root, with a size limit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.data.images import MAX_FILE_BYTES
from ds_dpo.data.reading.arrow_values import Unreadable
from ds_dpo.data.source import RawImage
from ds_dpo.errors import DataError, shown
from ds_dpo.outside import read_regular

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# longer than a name of a file may be, or with the first bytes of JPEG, PNG, WebP, GIF; also as a data: address
BASE64 = re.compile(
    r"(data:[^,]{0,100};base64,.*|(/9j/|iVBORw0KGgo|UklGR|R0lGOD)[A-Za-z0-9+/_=\s-]*|[A-Za-z0-9+/_=\s-]{256,})",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class MemberBytes:
    """The place of a tar's member in its file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the member. Raises DataError if it cannot be read completely, or is larger than MAX_FILE_BYTES."""
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
    """Finds image files by the paths in rows. root: the folder that relative paths start from."""

    root: Path

    def locate(self, path: str) -> Path:
        """Return the absolute path. Raises DataError if it leads out of root, or there is no such file."""
        root = os.path.abspath(self.root)
        # links are not resolved: the files of a downloaded dataset may be links to a store elsewhere
        place = os.path.normpath(os.path.join(root, path))
        if os.path.commonpath([root, place]) != root or "\0" in path:
            raise DataError(
                f"path {shown(path)} leads out of {root}; "
                + (_looks_like(path) or "a path below it would fit, or set data.image_root to a folder above it")
            )
        if not os.path.isfile(place):  # reading a device or a pipe might never end
            looks_like = _looks_like(path)
            raise DataError(f"path {shown(path)}: {looks_like or f'there is no file {place}'}")
        return Path(place)


def _looks_like(path: str) -> str | None:
    """Return what a value is that is not the path of a file, and what would fit; None if it may well be a path."""
    if ADDRESS.match(path):
        return "it looks like an address; download the images, and give their paths"
    if BASE64.fullmatch(path):
        return "it looks like base64; the path of an image would fit, or parquet with the bytes of images"
    return None


def read_file(path: Path) -> bytes:
    """Return a file's bytes. Raises DataError if it cannot be read, or is larger than MAX_FILE_BYTES."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return read_regular(path, max_bytes=MAX_FILE_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def raw_image(value: Any, find_file: Callable[[str], Path]) -> RawImage:
    """Return an image for the decoder: the row's value, or the bytes of the file that it names.

    Raises DataError for null, for a value that cannot be an image, and for a path without a readable file.
    """
    if isinstance(value, Unreadable):
        raise DataError(value.reason)
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
