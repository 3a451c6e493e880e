"""What the names of a dataset's files say: which split a file belongs to, and whether files of a split are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch, fnmatchcase
from pathlib import PurePath, PurePosixPath

from ds_dpo.config.data import DataConfig
from ds_dpo.data.selection.formats import FORMATS, FileKind
from ds_dpo.errors import DataError

SUFFIXES: Mapping[FileKind, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "text": (".jsonl", ".json", ".csv"),
    "tar": (".tar",),
}
# SPLIT-NNNNN-of-NNNNN, behind which `push_to_hub` may write more, such as a dash and 16 hexadecimal digits; that is the
# pattern {split}-[0-9]{5}-of-[0-9]{5}* of `datasets`
STEM = re.compile(
    r"(?P<split>.*?)(?:(?:^|[-_])(?P<number>\d+)(?:-of-(?P<total>\d+)(?:(?<=-of-\d{5})\D.*)?)?)?", re.DOTALL
)
# the names that Spark and Dask write into a folder; they do not say a split
PART = re.compile(r"part[-._]\d+.*", re.DOTALL)
PART_SPLIT = "part"
# behind which some programs write the codec: train.snappy.parquet
CODECS = frozenset({".snappy", ".gz", ".gzip", ".zstd", ".zst", ".lz4", ".br", ".brotli"})
# files that libraries write next to the data
FILES_OF_LIBRARIES = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
# the file name of image folders; it counts as any split that is asked for
ANY_SPLIT = "metadata"
NUM_NAMES_LISTED = 20

# relative to the dataset's folder, by split
Splits = dict[str, list[PurePath]]


def splits_of(
    paths: Iterable[PurePath], kind: FileKind, data: DataConfig, *, card: Mapping[str, Sequence[str]] | None
) -> Splits:
    """Return the files of one kind by split, in order. card: patterns by split that README.md lists for data.name.

    paths: relative to the dataset's folder; hidden ones do not count.
    """
    visible = sorted(
        path for path in paths if path.suffix in SUFFIXES[kind] and path.name not in FILES_OF_LIBRARIES and _shows(path)
    )
    if data.name is not None and card is not None:
        matching = {
            split: [path for path in visible if any(fnmatch(path.as_posix(), each) for each in patterns)]
            for split, patterns in card.items()
        }
        return {split: of_split for split, of_split in matching.items() if of_split}
    splits: Splits = {}
    for path in visible:
        if data.name is None or path.parts[0] == data.name:
            splits.setdefault(split_of(path), []).append(path)
    if data.split == PART_SPLIT and PART_SPLIT not in splits:
        parts = [path for of_split in splits.values() for path in of_split if PART.fullmatch(_stem(path))]
        splits |= {PART_SPLIT: parts} if parts else {}
    if kind == "text" and data.split not in splits and ANY_SPLIT in splits:
        splits[data.split] = splits.pop(ANY_SPLIT)
    return splits


def split_of(path: PurePath) -> str:
    """Return the split in a file's name, or its folder's name. path: relative to the dataset's folder."""
    stem = _stem(path)
    match = STEM.fullmatch(stem)
    assert match is not None, "every name fits"
    named = "" if PART.fullmatch(stem) else match["split"]
    return named or path.parent.name or "train"


def files_of_patterns(paths: Iterable[PurePath], data: DataConfig) -> list[PurePath]:
    """Return the files that data.files names, in order. paths: all files, relative to the dataset's folder.

    A pattern is matched part by part: * does not pass a /, ** does. Raises DataError for a pattern that leads out of
    the folder or matches no file, and for files of another kind than data.format reads or of two kinds.
    """
    visible = sorted(filter(_shows, paths))
    chosen: set[PurePath] = set()
    for pattern in data.files:
        parts = PurePosixPath(pattern).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise DataError(
                f"data.files has {pattern!r}; a pattern below data.dataset would fit, such as part-*.parquet"
            )
        matching = [path for path in visible if path.parts == parts or _fits(path.parts, parts)]
        if not matching:
            there = ", ".join(path.as_posix() for path in visible[:NUM_NAMES_LISTED])
            more = f" and {len(visible) - NUM_NAMES_LISTED} more" if len(visible) > NUM_NAMES_LISTED else ""
            raise DataError(
                f"data.files has {pattern}, which matches no file of data.dataset {data.dataset}; it has "
                f"{there or 'no files'}{more}"
            )
        chosen.update(matching)
    suffixes = {path.suffix for path in chosen}
    kinds = FORMATS[data.format].files
    if unread := sorted(path.as_posix() for path in chosen if kind_of(path, kinds) is None):
        raise DataError(
            f"data.files matches {unread[0]}, and data.format {data.format} reads {suffixes_of(kinds)} files; a "
            "pattern that ends in the suffix would fit"
        )
    if len(suffixes) > 1:
        raise DataError(f"data.files matches {' and '.join(sorted(suffixes))} files; patterns of one kind would fit")
    return sorted(chosen)


def kind_of(path: PurePath, kinds: Sequence[FileKind]) -> FileKind | None:
    """Return the kind of a file by its suffix, or None if it is none of the kinds."""
    return next((kind for kind in kinds if path.suffix in SUFFIXES[kind]), None)


def suffixes_of(kinds: Sequence[FileKind]) -> str:
    """Return the suffixes of some kinds of files, in words."""
    return " or ".join(suffix for kind in kinds for suffix in SUFFIXES[kind])


def require_one_set(files: Sequence[PurePath], data: DataConfig) -> None:
    """Raise DataError if a split's files belong to two datasets, which would be read as one."""
    if data.name is not None and len({path.suffix for path in files}) == 1:
        return
    if len(folders := sorted({str(path.parent) for path in files})) > 1:
        raise DataError(
            f"data.dataset {data.dataset}: files of split {data.split} are in {', '.join(folders)}; give one of these "
            "folders, or its name as data.name, or the files as data.files"
        )
    if len(suffixes := sorted({path.suffix for path in files})) > 1:
        raise DataError(
            f"data.dataset {data.dataset}: split {data.split} exists as {' and '.join(suffixes)}; give one file"
        )


def require_all_shards(files: Sequence[PurePath], data: DataConfig) -> None:
    """Raise DataError if the names show that files are missing, or there twice.

    A run would silently train on fewer pairs, or on some pairs twice.
    """
    places: dict[tuple[PurePath, int, int], PurePath] = {}
    uploads: dict[PurePath, tuple[str | None, PurePath]] = {}  # of each folder: the total of one file, and the file
    for path in files:
        match = STEM.fullmatch(_stem(path))
        stated = match["total"] if match else None
        total_there, other = uploads.setdefault(path.parent, (stated, path))
        if total_there != stated:
            raise DataError(
                f"data.dataset {data.dataset}, split {data.split}: {other.name} and {path.name} are of two uploads, so "
                "pairs may be there twice; delete the files of one, or name those to read with data.files"
            )
        if match is None or not match["total"]:
            continue
        number, total = int(match["number"]), int(match["total"])
        other = places.setdefault((path.parent, total, number), path)
        if other is not path:
            raise DataError(
                f"data.dataset {data.dataset}, split {data.split}: {other.name} and {path.name} are both number "
                f"{number} of {total}; delete the files of one upload, or name those to read with data.files"
            )
    for wanted in sorted({total for _, total, _ in places}):
        present = {number for _, total, number in places if total == wanted}
        if missing := sorted(set(range(wanted)) - present):
            raise DataError(
                f"data.dataset {data.dataset}, split {data.split}: {len(missing)} of {wanted} files are missing, the "
                f"first is {data.split}-{missing[0]:05}-of-{wanted:05}{files[0].suffix}; copy or download them all"
            )


def _stem(path: PurePath) -> str:
    stem = path.stem
    return PurePath(stem).stem if PurePath(stem).suffix in CODECS else stem


def _shows(path: PurePath) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
