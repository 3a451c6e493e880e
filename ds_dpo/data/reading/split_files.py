"""Find the files of one split of a dataset in a file, a folder, a save_to_disk folder, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import yaml
from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import snapshot_download

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.data import DataConfig
from ds_dpo.data.selection.formats import FORMATS, FileKind
from ds_dpo.errors import DataError

SUFFIXES: Mapping[FileKind, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "text": (".jsonl", ".json", ".csv"),
    "tar": (".tar",),
}
STEM = re.compile(r"(?P<split>.*?)(?:(?:^|[-_])(?P<number>\d+)(?:-of-(?P<total>\d+))?)?")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# files that libraries write next to the data
FILES_OF_LIBRARIES = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
# the file name of image folders; it counts as any split that is asked for
ANY_SPLIT = "metadata"


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """A split's files, in order. root: the folder to which names and image paths are relative.

    dataset: opened, for a save_to_disk folder only.
    """

    kind: FileKind
    files: Sequence[Path]
    root: Path
    dataset: Dataset | None = None


def find_split(data: DataConfig) -> SplitFiles:
    """Return the files of data.split of data.dataset; downloads them if it is a hub id.

    A single file counts as any split that is asked for. In a folder, the split is the part of a file's name before its
    number (train-00000-of-00003.parquet, train.jsonl), or the subfolder's name if the file has only a number
    (train/0000.parquet). Raises DataError; if the split is missing, it lists the splits that exist.
    """
    location = Path(resolve_asset(data.dataset)).expanduser().absolute()
    kinds = FORMATS[data.format].files
    if location.is_file():
        return _one_file(location, data)
    if (location / "dataset_info.json").is_file() or (location / "dataset_dict.json").is_file():
        return _saved(location, data)
    if location.is_dir():
        return _in_folder(location, data)
    if not HUB_ID.fullmatch(data.dataset) or data.dataset.startswith((".", "-")):
        raise DataError(f"data.dataset {data.dataset}: there is no such file or folder ({location})")
    downloadable = [kind for kind in kinds if kind != "text"]
    if not downloadable:
        raise DataError(
            f"data.dataset {data.dataset}: format {data.format} is read from local files, because its images are "
            f"separate files; download it (hf download {data.dataset} --repo-type dataset --local-dir FOLDER), unpack "
            "its images, and give the manifest's path"
        )
    return _in_folder(_download(data, downloadable[0]).absolute(), data)


def _one_file(path: Path, data: DataConfig) -> SplitFiles:
    kinds = FORMATS[data.format].files
    for kind in kinds:
        if path.suffix in SUFFIXES[kind]:
            return SplitFiles(kind=kind, files=[path], root=path.parent)
    raise DataError(
        f"data.dataset {data.dataset} is a file of another kind; data.format {data.format} needs a "
        f"{_suffixes(kinds)} file"
    )


def _saved(folder: Path, data: DataConfig) -> SplitFiles:
    if "parquet" not in FORMATS[data.format].files:
        raise DataError(
            f"data.dataset {data.dataset} is a save_to_disk folder, which data.format {data.format} cannot read"
        )
    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"data.dataset {data.dataset}, a save_to_disk folder, cannot be read: {error}") from error
    if isinstance(saved, DatasetDict):
        splits = {str(name): dataset for name, dataset in saved.items()}
    else:
        # a dataset that was saved alone may not know its split; then it counts as the one asked for
        splits = {str(saved.split or data.split): saved}
    if data.split not in splits:
        raise _no_such_split(data, splits)
    dataset = splits[data.split]
    files = [Path(each["filename"]) for each in dataset.cache_files]
    return SplitFiles(kind="parquet", files=files, root=folder, dataset=dataset)


def _in_folder(folder: Path, data: DataConfig) -> SplitFiles:
    there: set[str] = set()
    for kind in FORMATS[data.format].files:
        splits = _splits_in(folder, kind, data)
        if data.split in splits:
            files = [folder / path for path in splits[data.split]]
            _check_one_set(files, data)
            _check_all_shards(files, data)
            return SplitFiles(kind=kind, files=files, root=folder)
        there |= splits.keys()
    raise _no_such_split(data, there)


def _splits_in(folder: Path, kind: FileKind, data: DataConfig) -> dict[str, list[PurePath]]:
    """Return the files of each split of data.name, below the folder."""
    found = [
        path.relative_to(folder)
        for suffix in SUFFIXES[kind]
        # a manifest is at the top; subfolders may hold millions of images
        for path in (folder.glob(f"*{suffix}") if kind == "text" else folder.rglob(f"*{suffix}"))
        if path.name not in FILES_OF_LIBRARIES
    ]
    visible = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    if data.name is not None:
        patterns = _patterns_of_subset(folder, data.name)
        if patterns is not None:
            matching = {
                split: [path for path in visible if any(fnmatch(path.as_posix(), each) for each in of_split)]
                for split, of_split in patterns.items()
            }
            return {split: list(paths) for split, paths in matching.items() if paths}
        visible = [path for path in visible if path.parts[0] == data.name]
    splits: dict[str, list[PurePath]] = {}
    for path in visible:
        splits.setdefault(_split_of(path), []).append(path)
    if kind == "text" and data.split not in splits and ANY_SPLIT in splits:
        splits[data.split] = splits.pop(ANY_SPLIT)
    return splits


def _patterns_of_subset(folder: Path, name: str) -> dict[str, list[str]] | None:
    """Return the file patterns of each split that README.md lists for a subset, or None if it lists none."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    configs = header.get("configs") if isinstance(header, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict) and config.get("config_name") == name and config.get("data_files"):
            return _patterns_by_split(config["data_files"])
    return None


def _patterns_by_split(data_files: Any) -> dict[str, list[str]]:
    """Return the patterns in `data_files` of a card: one pattern, a list of them, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    return patterns


def _split_of(path: PurePath) -> str:
    """Return the split in a file's name. path: relative to the dataset's folder."""
    match = STEM.fullmatch(path.stem)
    assert match is not None, "every name fits"
    return match["split"] or path.parent.name or "train"


def _check_one_set(files: Sequence[Path], data: DataConfig) -> None:
    """Raise DataError if a split's files belong to two datasets, which would be read as one."""
    if data.name is not None and len({path.suffix for path in files}) == 1:
        return
    if len(folders := sorted({str(path.parent) for path in files})) > 1:
        raise DataError(
            f"data.dataset {data.dataset}: files of split {data.split} are in {', '.join(folders)}; give one of these "
            "folders, or its name as data.name"
        )
    if len(suffixes := sorted({path.suffix for path in files})) > 1:
        raise DataError(
            f"data.dataset {data.dataset}: split {data.split} exists as {' and '.join(suffixes)}; give one file"
        )


def _check_all_shards(files: Sequence[Path], data: DataConfig) -> None:
    """Raise DataError if the file names show that some are missing; a run would silently train on fewer pairs."""
    names = [(match, path) for path in files if (match := STEM.fullmatch(path.stem)) and match["total"]]
    for total in sorted({int(name["total"]) for name, _ in names}):
        present = {int(name["number"]) for name, _ in names if int(name["total"]) == total}
        if missing := sorted(set(range(total)) - present):
            raise DataError(
                f"data.dataset {data.dataset}, split {data.split}: {len(missing)} of {total} files are missing, the "
                f"first is {data.split}-{missing[0]:05}-of-{total:05}{names[0][1].suffix}; copy or download them all"
            )


def _download(data: DataConfig, kind: FileKind) -> Path:
    """Return the folder with a hub dataset's files of the split, downloaded now or earlier; no other split is."""

    def snapshot(patterns: list[str], *, dry_run: bool = False) -> Any:
        cache_dir = None if data.cache_dir is None else Path(data.cache_dir) / "hub"
        return snapshot_download(
            data.dataset,
            repo_type="dataset",
            revision=data.revision,
            allow_patterns=patterns,
            cache_dir=cache_dir,
            dry_run=dry_run,
        )

    suffix = SUFFIXES[kind][0]
    try:
        patterns = [f"*{data.split}*{suffix}"]
        if data.name is not None:
            listed = _patterns_of_subset(Path(snapshot(["README.md"])), data.name)
            patterns = [f"{data.name}/*{data.split}*{suffix}"] if listed is None else listed.get(data.split, [])
        # an empty list of patterns would download everything
        folder = Path(snapshot([*patterns, "README.md"]))
        there = set(_splits_in(folder, kind, data))
        if data.split not in there:
            # files that are only numbered do not have the split in their names
            paths = [PurePath(file.filename) for file in snapshot([f"*{suffix}"], dry_run=True)]
            wanted = [path for path in paths if data.name is None or path.parts[0] == data.name]
            there = set(map(_split_of, wanted))
            if of_split := [path.as_posix() for path in wanted if _split_of(path) == data.split]:
                folder = Path(snapshot([*of_split, "README.md"]))
    # a hub client's errors (network, HTTP, names, cache) have no common base class
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data.dataset {data.dataset} is not a local file or folder, and its split {data.split} cannot be "
            f"downloaded from the hub ({reason}); give a local folder, or check the name, the network, and your access"
        ) from error
    if data.split not in there:
        raise _no_such_split(data, there)
    return folder


def _no_such_split(data: DataConfig, splits: Iterable[str]) -> DataError:
    subset = "" if data.name is None else f", subset {data.name},"
    there = ", ".join(sorted(set(splits)))
    kinds = _suffixes(FORMATS[data.format].files)
    return DataError(
        f"data.dataset {data.dataset}{subset} has no split {data.split}; it has {there or f'no {kinds} file'}"
    )


def _suffixes(kinds: Sequence[FileKind]) -> str:
    return " or ".join(suffix for kind in kinds for suffix in SUFFIXES[kind])
